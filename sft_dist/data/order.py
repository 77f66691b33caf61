"""The order in which rows are trained on: a function of seed, epoch and number of rows, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class GlobalOrder(Sampler[int]):
    """A permutation of the rows per epoch, filled up to whole global batches with an empty row.

    Libraries fill the last batch of an epoch by repeating rows from its beginning, as many as the number of
    processes needs, so that the same recipe trains on different rows on one process and on eight. Here the
    filler is row number `rows`, in which nothing is trained: it changes neither loss nor gradient.
    """

    def __init__(self, rows: int, global_batch_size: int, seed: int) -> None:
        self.rows = rows
        self.filler = -rows % global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of an epoch; called by the training loop."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.filler

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        for _ in range(self.filler):
            yield self.rows
