"""Training on data that is prepared while it is trained on, block by block.

A block is so many documents in the order of their sources, shuffled and packed by itself. One process of each node,
the producer, makes the blocks as folders on the node's disk, a few ahead of the training; all ranks of the node read
them. What a block holds is a function of the recipe and of the position before it, so that every node makes the same
blocks, however many ranks there are, and a run that goes on from a checkpoint needs the position alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler

from sft_dist.data.account import Account
from sft_dist.data.arrangement import (
    alone,
    derived_seed,
    document_lengths,
    filler_document,
    generator,
    row_lengths,
)
from sft_dist.data.order import FILLER, Row
from sft_dist.data.packing import Ints, Packs, pack
from sft_dist.errors import DataError
from sft_dist.rundir import write_text

if TYPE_CHECKING:
    import datasets

# Documents of a block are numbered within it; a number of the whole stream is block << _SHIFT | document.
_SHIFT = 32
_POLL = 0.05  # seconds
# Global batches that lie between the order, which runs ahead, and the slowest reader of a node, at most.
_LAG = 64


@dataclass(frozen=True)
class Position:
    """Where a stream stands before a block: what a checkpoint keeps of it.

    `row`: rows of all blocks before. `sources`: the place in each source (see `feeds.Place`). `draws`: the state of
    the choice among them.
    """

    block: int = 0
    row: int = 0
    sources: tuple[tuple[int, int, int], ...] = ()
    draws: Any = None

    @classmethod
    def of(cls, held: dict[str, Any]) -> Position:
        """The position of which `dataclasses.asdict` made a JSON object."""
        return cls(held["block"], held["row"], tuple((e, n, taken) for e, n, taken in held["sources"]), held["draws"])


@dataclass(frozen=True)
class Layout:
    """How the documents of a block become rows: `capacity` of packed rows, None for one document each; and the seed."""

    capacity: int | None
    seed: int

    def rows(self, block: int, lengths: Ints) -> Packs:
        """The rows of a block from its documents' lengths, (documents,), in the order they are trained on."""
        if self.capacity is not None:
            return pack(lengths, self.capacity, seed=derived_seed(self.seed, block))
        return alone(generator(self.seed, block).permutation(len(lengths)))


@dataclass(frozen=True)
class Folder:
    """The names in a stream's folder on a node."""

    root: Path

    def block(self, number: int) -> Path:
        return self.root / f"block-{number}"

    def blocks(self) -> list[int]:
        """The blocks that are there."""
        names = (path.name for path in self.root.glob("block-*"))
        return sorted(int(name[6:]) for name in names if name[6:].isdigit())

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def wanted(self) -> Path:
        """First and last block that the training may still ask for, written by local rank 0."""
        return self.root / "wanted.json"

    @property
    def error(self) -> Path:
        return self.root / "error.txt"


@dataclass
class Block:
    """A block on the disk: `before` is the position before it, `after` the one behind it.

    `accounts`: of each source, for the pass at hand.
    """

    rows: datasets.Dataset
    packs: Packs
    before: Position
    after: Position
    accounts: list[dict[str, Any]]

    @cached_property
    def row_lengths(self) -> Ints:
        return row_lengths(self.packs, document_lengths(self.rows))


@dataclass
class Stream:
    """The blocks of a stream as one rank of a node reads them.

    `check`: on local rank 0, which has started the producer and tells it what is wanted, looks after it while a block
    is waited for.
    """

    folder: Folder
    layout: Layout
    start: Position
    check: Callable[[], None] | None = None
    _open: dict[int, Block] = field(default_factory=dict)
    _positions: dict[int, Position] = field(default_factory=dict)

    def block(self, number: int) -> Block:
        """A block, waited for where it is not there yet. Raises :class:`DataError` where it cannot be made."""
        found = self._open.pop(number, None)
        if found is None:
            self._wait(number)
            found = _read_block(self.folder.block(number), self.layout)
            self._positions[number] = found.before
        # The latest used is the last; two blocks are in use where a batch goes over a border.
        self._open[number] = found
        while len(self._open) > 2:
            del self._open[next(iter(self._open))]
        return found

    def _wait(self, number: int) -> None:
        while not self.folder.block(number).is_dir():
            if self.folder.error.exists():
                raise DataError(self.folder.error.read_text(encoding="utf-8"))
            if self.check is not None:
                self.check()
            time.sleep(_POLL)

    def want(self, first: int, last: int) -> None:
        """Tell the producer what is still wanted; only local rank 0 does."""
        if self.check is not None:
            write_text(self.folder.wanted, json.dumps([first, last]))

    def position_at(self, row: int) -> Position:
        """The position before the block that holds a row; of the rows that were read lately."""
        return max((p for p in self._positions.values() if p.row <= row), key=lambda p: p.row, default=self.start)

    def accounts(self) -> list[Account]:
        """The account of each source up to the block that was read last."""
        return [Account(**held) for held in self._open[max(self._open)].accounts]

    def forget_before(self, row: int) -> int:
        """Forget the positions that no row from `row` on needs. Returns the first block that is still wanted."""
        first = self.position_at(row)
        for number in [n for n in self._positions if n < first.block]:
            del self._positions[number]
        return first.block


class StreamOrder(Sampler[Row]):
    """The rows of a stream from `start_row` on, without end, in global batches, each sorted by length.

    As `GlobalOrder`; a document's number tells its block.
    """

    def __init__(self, stream: Stream, global_batch_size: int, start_row: int = 0) -> None:
        self.stream = stream
        self.global_batch_size = global_batch_size
        self.start_row = start_row

    def set_epoch(self, epoch: int) -> None:
        """A stream has no epochs of its own."""

    def __iter__(self) -> Iterator[Row]:
        batch: list[tuple[int, Row]] = []
        position = self.stream.position_at(self.start_row)
        number, row, skipped = position.block, self.start_row, self.start_row - position.row
        while True:
            first = self.stream.forget_before(max(row - _LAG * self.global_batch_size, 0))
            self.stream.want(first, number)
            block = self.stream.block(number)
            for place in range(skipped, len(block.packs)):
                documents = tuple(number << _SHIFT | int(document) for document in block.packs[place])
                batch.append((int(block.row_lengths[place]), documents))
                if len(batch) == self.global_batch_size:
                    yield from (documents for _, documents in sorted(batch, key=lambda one: -one[0]))
                    row, batch = row + len(batch), []
            number, skipped = number + 1, 0


class StreamRows(Dataset[list[dict[str, Any]]]):
    """Rows of a stream by their documents, as `DocumentRows`."""

    def __init__(self, stream: Stream, filler_token: int, has_sources: bool) -> None:
        self.stream = stream
        self.columns = ["input_ids", "labels", *(["source"] if has_sources else [])]
        self.filler = filler_document(filler_token, has_sources)

    def __getitem__(self, documents: Iterable[int]) -> list[dict[str, Any]]:
        if documents == FILLER:
            return [self.filler]
        return [self._document(number >> _SHIFT, number & ((1 << _SHIFT) - 1)) for number in documents]

    def _document(self, block: int, number: int) -> dict[str, Any]:
        row = self.stream.block(block).rows[number]
        return {name: row[name] for name in self.columns}


def _read_block(folder: Path, layout: Layout) -> Block:
    import datasets

    held = json.loads((folder / "block.json").read_text(encoding="utf-8"))
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow")).with_format("numpy")
    before, after = Position.of(held["before"]), Position.of(held["after"])
    return Block(rows, layout.rows(before.block, document_lengths(rows)), before, after, held["accounts"])
