"""Equal conversations found by 128-bit digests: within a split, and between what is trained on and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 16  # bytes; two of a billion different records are equal with a chance of 1e-21
_PENDING = 1 << 15
_AT_ONCE = 1 << 16  # rows


def digest(turns: str) -> bytes:
    """The digest of a conversation, given as JSON."""
    return hashlib.blake2b(turns.encode(), digest_size=SIZE).digest()


class Seen:
    """A growing set of digests, `SIZE` bytes each beside a part of constant size."""

    def __init__(self) -> None:
        self._sorted = [np.zeros(0, f"S{SIZE}") for _ in range(256)]  # by the first byte
        self._pending: set[bytes] = set()

    def add(self, digest: bytes) -> bool:
        """Take in a digest; tells whether it is new."""
        if digest in self:
            return False
        self._pending.add(digest)
        if len(self._pending) >= _PENDING:
            self._settle()
        return True

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pending or bool(_among(np.array([digest], f"S{SIZE}"), self._sorted[digest[0]])[0])

    def _settle(self) -> None:
        every = np.array(sorted(self._pending), f"S{SIZE}")
        firsts = np.searchsorted(every, np.array([bytes([b]) for b in range(1, 256)], f"S{SIZE}"))
        for bucket, new in enumerate(np.split(every, firsts)):
            old = self._sorted[bucket]
            self._sorted[bucket] = np.insert(old, np.searchsorted(old, new), new)
        self._pending.clear()


def overlap(train: Dataset, held_out: Dataset) -> list[tuple[str, str]]:
    """Records of `held_out` that also stand in `train`, as (where in held_out, where in train), in their order.

    Both are prepared rows. Memory: 24 bytes for each held-out row, and names of those that are found.
    """
    ours = np.array([d for part in _column(held_out, "digest") for d in part], f"S{SIZE}")
    order = np.argsort(ours, kind="stable")
    ours = ours[order]
    found: dict[bytes, int] = {}
    number = 0
    for part in _column(train, "digest"):
        theirs = np.array(part, f"S{SIZE}")
        for place in np.flatnonzero(_among(theirs, ours)).tolist():
            found.setdefault(part[place], number + place)
        number += len(part)
    if not found:
        return []
    pairs: dict[str, str] = {}
    for place in np.sort(order[_among(ours, np.array(sorted(found), f"S{SIZE}"))]).tolist():
        row = held_out[place]
        pairs.setdefault(row["where"], train[found[row["digest"]]]["where"])
    return list(pairs.items())


def _column(rows: Dataset, name: str) -> Iterator[list[Any]]:
    table = rows.select_columns([name]).with_format("arrow")
    for start in range(0, len(table), _AT_ONCE):
        yield table[start : start + _AT_ONCE][name].to_pylist()


def _among(some: NDArray[np.bytes_], ordered: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(some), np.bool_)
    places = np.minimum(np.searchsorted(ordered, some), len(ordered) - 1)
    return np.asarray(ordered[places] == some)


def new_among(digests: Sequence[bytes], seen: Seen) -> NDArray[np.bool_]:
    """Which of the digests, taken in one after the other, were new."""
    return np.array([seen.add(digest) for digest in digests], np.bool_)
