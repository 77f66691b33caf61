"""Which documents make up the rows of each epoch, and the rows themselves.

A prepared record is a document. A row is what takes one place in a micro-batch: one document, or several packed ones.
Everything here is a function of lengths, settings and seed; the number of processes has no part in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from sft_dist.data.masking import IGNORE
from sft_dist.data.packing import Ints, Packs, fill, pack

if TYPE_CHECKING:
    import datasets

# Documents of a mixture that are packed together: few enough for the proportions to hold all along an epoch, and
# enough for full rows.
MIXTURE_BUFFER = 2**14


class Documents(Protocol):
    """The documents of an epoch in their order, as many in each epoch (see `sft_dist.data.mixture`)."""

    def documents(self, epoch: int) -> Ints:
        """Numbers of documents, (documents,)."""


class Arrangement:
    """The rows of each epoch, as many in each.

    `lengths` are tokens per document, (documents,). `capacity` is the length of packed rows, None for rows of one
    document each. With a `mixture` the documents of an epoch come in its order, without one all of them in a
    permutation of their own.
    """

    def __init__(self, lengths: Ints, capacity: int | None, seed: int, mixture: Documents | None = None) -> None:
        self.lengths = lengths
        self.capacity = capacity
        self.seed = seed
        self.mixture = mixture
        self.rows = functools.lru_cache(maxsize=1)(self._rows)
        # Of passes that are over only the number of rows is asked.
        self._packed_pass = functools.lru_cache(maxsize=2)(self._pack_pass)
        self._rows_of_pass = functools.cache(lambda number: len(self._packed_pass(number)))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        if self.mixture is not None and self.capacity is not None:
            return self._rows_of_pass(0)
        return len(self.rows(0))

    def fill(self) -> float:
        """The share of the packed rows' tokens that are documents', in the first epoch."""
        return 1.0 if self.capacity is None else fill(self.rows(0), self.lengths, self.capacity)

    def _rows(self, epoch: int) -> Packs:
        if self.capacity is None:
            return alone(self._permuted(epoch) if self.mixture is None else self.mixture.documents(epoch))
        if self.mixture is None:
            return _reordered(self._all_packed, generator(self.seed, epoch))
        return self._slice_of_passes(epoch)

    def _permuted(self, epoch: int) -> Ints:
        return generator(self.seed, epoch).permutation(len(self.lengths))

    @functools.cached_property
    def _all_packed(self) -> Packs:
        """Packed once: each document is trained on once an epoch, and every epoch has as many rows."""
        assert self.capacity is not None
        return pack(self.lengths, self.capacity, seed=self.seed)

    def _pack_pass(self, number: int) -> Packs:
        """One pass of the mixture, packed buffer by buffer, so that proportions hold within an epoch."""
        assert self.capacity is not None and self.mixture is not None
        documents = self.mixture.documents(number)
        pieces = []
        for start in range(0, len(documents), MIXTURE_BUFFER):
            here = documents[start : start + MIXTURE_BUFFER]
            packs = pack(self.lengths[here], self.capacity, seed=derived_seed(self.seed, number, start))
            pieces.append(Packs(here[packs.rows], packs.starts))
        return joined(pieces)

    def _slice_of_passes(self, epoch: int) -> Packs:
        """As many packed rows in each epoch as in the first, though passes differ by some.

        Passes are laid end to end, and an epoch begins where the one before it has ended.
        """
        start, stop = epoch * len(self), (epoch + 1) * len(self)
        pieces: list[Packs] = []
        end = number = 0
        while end < stop:
            begin, end = end, end + self._rows_of_pass(number)
            if end > start:
                pieces.append(part(self._packed_pass(number), max(start - begin, 0), min(stop, end) - begin))
            number += 1
        return joined(pieces)


def alone(documents: Ints) -> Packs:
    """Each document as a row."""
    return Packs(documents, np.arange(len(documents) + 1))


def part(packs: Packs, start: int, stop: int) -> Packs:
    """The rows from `start` to before `stop`."""
    starts = packs.starts[start : stop + 1]
    return Packs(packs.rows[starts[0] : starts[-1]], starts - starts[0])


def joined(pieces: Sequence[Packs]) -> Packs:
    """The rows of several packings, one after the other."""
    ends = np.cumsum([0, *(len(piece.rows) for piece in pieces)])
    starts = [piece.starts[:-1] + end for piece, end in zip(pieces, ends, strict=False)]
    return Packs(np.concatenate([piece.rows for piece in pieces]), np.concatenate([*starts, ends[-1:]]))


def row_lengths(packs: Packs, lengths: Ints) -> Ints:
    """Tokens of each row, (rows,)."""
    return np.add.reduceat(lengths[packs.rows], packs.starts[:-1]) if len(packs) else np.empty(0, np.int64)


def _reordered(packs: Packs, chance: np.random.Generator) -> Packs:
    order = chance.permutation(len(packs))
    sizes = np.diff(packs.starts)[order]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    places = np.repeat(packs.starts[:-1][order] - starts[:-1], sizes) + np.arange(starts[-1])
    return Packs(packs.rows[places], starts)


def generator(*parts: int) -> np.random.Generator:
    """The source of chance of an epoch or a block: a seed, and the numbers that tell it from the others."""
    return np.random.Generator(np.random.PCG64(parts))


def derived_seed(*parts: int) -> int:
    """A seed of its own for each sequence of numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def document_lengths(rows: datasets.Dataset) -> Ints:
    """Tokens of each prepared document, (documents,)."""
    return np.asarray(rows.with_format("numpy")["length"][:], dtype=np.int64)


def filler_document(token: int, has_source: bool) -> dict[str, Any]:
    """The document of a filler row: one token, which is not trained."""
    return {"input_ids": [token], "labels": [IGNORE], **({"source": 0} if has_source else {})}


class DocumentRows(Dataset[list[dict[str, Any]]]):
    """Rows by their documents: the index is what `GlobalOrder` gives, the item a list of prepared documents.

    An empty index is the filler, a document in which nothing is trained. `borders`: the number of the first document
    of each source of a mixture; its documents then tell their source as an index in `source`.
    """

    def __init__(self, rows: datasets.Dataset, count: int, filler_token: int, borders: Sequence[int] = (0,)) -> None:
        self.rows = rows.select_columns(["input_ids", "labels"]).with_format("numpy")
        self.count = count
        self.borders = np.asarray(borders)
        self.filler = filler_document(filler_token, has_source=len(borders) > 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, documents: Iterable[int]) -> list[dict[str, Any]]:
        return [self._document(number) for number in documents] or [self.filler]

    def _document(self, number: int) -> dict[str, Any]:
        return {**self.rows[int(number)], **self._source(number)}

    def _source(self, number: int) -> dict[str, int]:
        if len(self.borders) == 1:
            return {}
        return {"source": int(np.searchsorted(self.borders, number, side="right")) - 1}
