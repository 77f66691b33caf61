"""The sources of a stream, each read again and again, and the choice of the source of each record."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sft_dist.data.files import RawRecord
from sft_dist.data.sources import Source
from sft_dist.errors import DataError

# Records that are prepared together.
BATCH = 512

Documents = list[dict[str, Any]]
Prepare = Callable[[Sequence[RawRecord]], list[Documents]]


class Draws(Protocol):
    """The source of each record in turn, with a state that can be kept as JSON (see `sft_dist.data.mixture`)."""

    def __next__(self) -> int: ...

    @property
    def state(self) -> Any: ...


@dataclass
class Feed:
    """The records of one source that have become documents, from a position on, without end.

    `prepare` gives the documents of each of some records, none for a record that is left out. `epoch`, `records`: how
    often the source has been read through, and the records read since, up to and with the one given last.
    """

    source: Source
    prepare: Prepare
    epoch: int = 0
    records: int = 0
    _ready: deque[tuple[int, int, Documents]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._reading = (self.epoch, self.records)
        self._raws: Iterator[RawRecord] = itertools.islice(self.source.records(), self.records, None)
        self._fruitless = 0

    def __next__(self) -> Documents:
        while not self._ready:
            self._fill()
        self.epoch, self.records, documents = self._ready.popleft()
        return documents

    def _fill(self) -> None:
        epoch, read = self._reading
        raws = list(itertools.islice(self._raws, BATCH))
        if not raws:
            self._begin_again(epoch, read)
            return
        prepared = self.prepare(raws)
        self._ready.extend((epoch, read + n, documents) for n, documents in enumerate(prepared, 1) if documents)
        self._fruitless = 0 if self._ready else self._fruitless + len(raws)
        self._reading = (epoch, read + len(raws))

    def _begin_again(self, epoch: int, read: int) -> None:
        if self._fruitless >= read:
            raise DataError(f"data.dataset_name: {self.source.name}: no record of it can be trained on; mend the data")
        self._reading = (epoch + 1, 0)
        self._raws = self.source.records()


def documents(feeds: Sequence[Feed], draws: Draws | None, count: int) -> Documents:
    """The next documents of all sources, `count` of them or a few more, for a record's documents stay together."""
    found: Documents = []
    while len(found) < count:
        number = next(draws) if draws is not None else 0
        found += [{**document, "source": number} for document in next(feeds[number])]
    return found
