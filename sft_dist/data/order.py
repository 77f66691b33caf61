"""The order in which rows are trained on: a function of seed, epoch and the rows' lengths, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GlobalOrder(Sampler[int]):
    """A permutation of the rows per epoch, cut into global batches, each sorted by length, the longest row first.

    Which rows make up a global batch is left to chance alone. Within it the order changes nothing, for the loss is
    normalised by the trained tokens of the whole global batch; sorted, rows of like length share a micro-batch, so
    that little is padded, and processes that take micro-batches in turn have like work.

    Libraries fill the last batch of an epoch by repeating rows from its beginning, as many as the number of
    processes needs, so that the same recipe trains on different rows on one process and on eight. Here the
    filler is row number `len(lengths)`, in which nothing is trained: it changes neither loss nor gradient.
    """

    def __init__(self, lengths: Sequence[int], global_batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of an epoch; called by the training loop."""
        self.epoch = epoch

    @property
    def filler(self) -> int:
        """Rows that are missing to whole global batches."""
        return -len(self.lengths) % self.global_batch_size

    def __len__(self) -> int:
        return len(self.lengths) + self.filler

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.global_batch_size):
            yield from sorted(order[start : start + self.global_batch_size], key=lambda row: -self.lengths[row])
        for _ in range(self.filler):
            yield len(self.lengths)
