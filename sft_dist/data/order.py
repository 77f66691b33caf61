"""The order in which rows are trained on: a function of seed, epoch and the rows' lengths, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from sft_dist.data.arrangement import Arrangement, row_lengths

Row = tuple[int, ...]
FILLER: Row = ()


class GlobalOrder(Sampler[Row]):
    """The rows of an epoch, cut into global batches, each sorted by length, the longest row first.

    A row is given as the numbers of its documents. Which rows make up a global batch is left to the arrangement.
    Within it the order changes nothing, for the loss is normalised by the trained tokens of the whole global batch;
    sorted, rows of like length share a micro-batch, so that little is padded, and processes that take micro-batches
    in turn have like work.

    Libraries fill the last batch of an epoch by repeating rows from its beginning, as many as the number of
    processes needs, so that the same recipe trains on different rows on one process and on eight. Here the
    filler is a row without a document, in which nothing is trained: it changes neither loss nor gradient.
    """

    def __init__(self, arrangement: Arrangement, global_batch_size: int) -> None:
        self.arrangement = arrangement
        self.global_batch_size = global_batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called by the training loop."""
        self.epoch = epoch

    @property
    def filler(self) -> int:
        """Rows that are missing to whole global batches."""
        return -len(self.arrangement) % self.global_batch_size

    def __len__(self) -> int:
        return len(self.arrangement) + self.filler

    def of_step(self, step: int) -> list[Row]:
        """The rows of an optimizer step, counted from 1 over all epochs."""
        epoch, place = divmod(step - 1, len(self) // self.global_batch_size)
        packs, start = self.arrangement.rows(epoch), place * self.global_batch_size
        stop = min(start + self.global_batch_size, len(packs))
        return [tuple(packs[row].tolist()) for row in range(start, stop)]

    def __iter__(self) -> Iterator[Row]:
        packs = self.arrangement.rows(self.epoch)
        lengths = row_lengths(packs, self.arrangement.lengths)
        for start in range(0, len(packs), self.global_batch_size):
            batch = lengths[start : start + self.global_batch_size]
            for place in np.argsort(-batch, kind="stable"):
                yield tuple(packs[start + int(place)].tolist())
        for _ in range(self.filler):
            yield FILLER
