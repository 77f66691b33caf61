"""The sources of a stream, each read again and again, and the choice of the source of each document."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import pyarrow as pa

from sft_dist.config import DataSection
from sft_dist.data.account import Account
from sft_dist.data.mixture import Draws
from sft_dist.data.pool import Batch, batches
from sft_dist.data.sources import Source
from sft_dist.data.work import Merger, Work
from sft_dist.errors import DataError

# How often a source has been read through, the records read since up to the batch at hand, and the documents of that
# batch that have been given.
Place = tuple[int, int, int]


class Feed:
    """The documents of one source from a place on, without end, each a batch of one row.

    `account` is that of the pass at hand. Raises :class:`DataError` for bad records as a preparation does, and where a
    whole pass gives no document.
    """

    def __init__(self, source: Source, data: DataSection, work: Work, place: Place = (0, 0, 0)) -> None:
        self.source, self.data, self.work = source, data, work
        self._epoch, self._records, self._taken = place
        self._whole_pass = self._records == 0
        self._merger = Merger(data, Account())
        self._batches = batches(itertools.islice(source.raw(), self._records, None))
        self._batch: Batch = []
        self._ready: deque[pa.RecordBatch] = deque()
        if self._taken:
            self._fill()
            for _ in range(self._taken):
                self._ready.popleft()

    @property
    def place(self) -> Place:
        """Where the next document is; a feed that is made with it goes on here."""
        return self._epoch, self._records, self._taken

    @property
    def account(self) -> Account:
        return self._merger.account

    def __next__(self) -> pa.RecordBatch:
        while not self._ready:
            self._records, self._taken = self._records + len(self._batch), 0
            self._fill()
        self._taken += 1
        return self._ready.popleft()

    def _fill(self) -> None:
        self._batch = next(self._batches, [])
        if not self._batch:
            self._begin_again()
            return
        rows, _ = self._merger.add(self.work(self._batch, self.account.format))
        rows = rows.select(["input_ids", "labels", "length"])
        self._ready.extend(rows.slice(number, 1) for number in range(rows.num_rows))

    def _begin_again(self) -> None:
        if self._whole_pass and not self.account.rows:
            raise DataError(f"data.dataset_name: {self.source.name}: no record of it can be trained on; mend the data")
        self._epoch, self._records, self._whole_pass = self._epoch + 1, 0, True
        self._merger = Merger(self.data, Account(format=self.account.format))
        self._batches = batches(self.source.raw())


def documents(feeds: Sequence[Feed], draws: Draws | None, count: int) -> pa.Table:
    """The next `count` documents of all sources: input_ids, labels, length, and the number of the `source`."""
    sources = [0 if draws is None else next(draws) for _ in range(count)]
    table = pa.Table.from_batches([next(feeds[number]) for number in sources])
    return table.append_column("source", pa.array(sources, pa.int32())).combine_chunks()
