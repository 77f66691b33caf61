"""The plan of a mixture: which document of which source comes when, exactly in proportion and without chance.

The sources take turns by R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of k sources
with the shares p_i, source i has come between n p_i - b and n p_i + b times after any n documents, where b is
1 - 1 / (2k - 2). The greedy rule, the source furthest behind its share, holds no such bound for more than two sources.
Only the order of the documents within a source is drawn, by seed, source and round. This module is free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# Numbers of sources.
Turns = NDArray[np.int16]
Stop = Literal["first_exhausted", "all_exhausted"]

# Documents of a pass that could still be held in memory; more is a weight that is far too small.
MOST = 2**31
# Turns that are planned at once.
_CHUNK = 2**20
_CHUNK_OF_AN_ITERATOR = 2**10
# A product of a window's formula has one bit less than int64.
_BITS = 61


def shares(weights: Sequence[float | None], sizes: Sequence[int | None], temperature: float) -> list[float]:
    """The probability of each source, in sum 1: in proportion to weight ** (1 / temperature).

    A weight that is missing is the number of documents of the source. Temperature 1 keeps the weights, and the higher
    it is, the nearer the sources come to equal shares: Raffel et al., "Exploring the limits of transfer learning with
    a unified text-to-text transformer" (T5, 2020), section 3.5.2, and Xue et al., "mT5" (2021), whose exponent alpha
    is 1 / temperature. Raises ValueError where a source has neither weight nor size.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    logs = []
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        value = size if weight is None else weight
        if value is None:
            raise ValueError(f"source {number} has neither a weight nor a known size")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"source {number} has the weight {value}; it must be above 0")
        logs.append(math.log(value) / temperature)
    # Relative to the largest, for the powers themselves can be too large for a float.
    powers = [math.exp(log - max(logs)) for log in logs]
    if 0 in powers:
        raise ValueError(f"source {powers.index(0)} is left without a share at temperature {temperature}; raise it")
    return [power / math.fsum(powers) for power in powers]


class Draws(Iterator[int]):
    """The sources in their turns, without end.

    An iterator that is made with the `state` of another goes on where the other stood.
    """

    def __init__(self, shares: Sequence[float], state: Sequence[int] | None = None) -> None:
        self._parts = _parts(shares)
        self._drawn = [0] * len(shares) if state is None else list(state)
        if len(self._drawn) != len(shares):
            raise ValueError(f"a state of {len(self._drawn)} sources for {len(shares)} shares")
        self._ahead: list[int] = []

    def __next__(self) -> int:
        if not self._ahead:
            self._ahead = _turns(self._parts, self._drawn, _CHUNK_OF_AN_ITERATOR)[::-1].tolist()
        source = self._ahead.pop()
        self._drawn[source] += 1
        return source

    @property
    def state(self) -> list[int]:
        """How often each source has come, for JSON; it tells all that is to come."""
        return list(self._drawn)


def schedule(shares: Sequence[float], count: int) -> Turns:
    """The sources of the first `count` turns, (count,); the same as those of :class:`Draws`."""
    parts, drawn = _parts(shares), np.zeros(len(shares), np.int64)
    pieces = []
    for start in range(0, count, _CHUNK):
        pieces.append(_turns(parts, drawn.tolist(), min(_CHUNK, count - start)))
        drawn += np.bincount(pieces[-1], minlength=len(shares))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int16)


class Mixture:
    """The documents of each training epoch, as many of each source in every one of them.

    `sizes` are documents per source, `shares` the probabilities of :func:`shares`. A source is read through again and
    again, each time in a new permutation, and goes on in an epoch where it stopped in the one before it. An epoch ends
    before the first source would begin again (`first_exhausted`), or when each has been read through
    (`all_exhausted`); this counts from the beginning of the training, and the later epochs are as long as the first.

    Documents are numbered through all sources: those of source i begin at `borders[i]`.
    Raises ValueError where a source is empty, is never drawn, or would make an epoch of more than `MOST` documents.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], stopping_strategy: Stop, seed: int) -> None:
        for number, size in enumerate(sizes):
            if size < 1:
                raise ValueError(f"source {number} has no document")
        if len(sizes) != len(shares):
            raise ValueError(f"{len(sizes)} sizes for {len(shares)} shares")
        self.sizes = list(sizes)
        self.shares = list(shares)
        self.stopping_strategy = stopping_strategy
        self.seed = seed
        self.borders: list[int] = [0, *np.cumsum(self.sizes)[:-1].tolist()]
        self.turns = self._turns_of_a_pass()
        self.counts: list[int] = np.bincount(self.turns, minlength=len(self.sizes)).tolist()
        for number, count in enumerate(self.counts):
            if count == 0:
                raise ValueError(
                    f"source {number} is not drawn once before another is exhausted; "
                    "raise its weight, or take all_exhausted"
                )

    def __len__(self) -> int:
        """Documents of an epoch."""
        return len(self.turns)

    def documents(self, epoch: int) -> Ints:
        """Numbers of documents in the order of a training epoch, (documents,); no earlier epoch is needed."""
        out = np.empty(len(self.turns), np.int64)
        for source, count in enumerate(self.counts):
            out[self.turns == source] = self._of_source(source, epoch * count, (epoch + 1) * count)
        return out

    def source_epochs(self, epoch: int) -> list[float]:
        """How often each source has been read through at the end of a training epoch."""
        return [(epoch + 1) * count / size for count, size in zip(self.counts, self.sizes, strict=True)]

    def _of_source(self, source: int, start: int, stop: int) -> Ints:
        """What the draws from `start` to before `stop` of one source bring, counted from the first epoch on."""
        size = self.sizes[source]
        pieces = []
        for round_ in range(start // size, (stop - 1) // size + 1):
            begin = round_ * size
            order = _permutation(size, self.seed, source, round_)
            pieces.append(order[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces) + self.borders[source]

    def _turns_of_a_pass(self) -> Turns:
        parts, first = _parts(self.shares), self.stopping_strategy == "first_exhausted"
        # The draw of each source that decides: the first of its second round, or the last of its first.
        deciding = [size + 1 if first else size for size in self.sizes]
        latest = [_latest(source, parts, draw) for source, draw in enumerate(deciding)]
        most = min(latest) if first else max(latest)
        if most > MOST:
            last = latest.index(most)
            raise ValueError(f"an epoch would be {most} documents, until source {last} is exhausted; raise its weight")
        turns = schedule(self.shares, most)
        places = [_place(turns, source, draw) for source, draw in enumerate(deciding)]
        return turns[: min(places)] if first else turns[: max(places) + 1]


def _place(turns: Turns, source: int, draw: int) -> int:
    """Where the draw of that number of a source stands, or the end where it does not come."""
    places = np.flatnonzero(turns == source)
    return int(places[draw - 1]) if len(places) >= draw else len(turns)


def _permutation(size: int, seed: int, source: int, round_: int) -> Ints:
    return np.random.Generator(np.random.PCG64([seed, source, round_])).permutation(size)


class _Parts(NamedTuple):
    """The shares as whole `parts` of `whole`, so that windows are exact; `slack` is 2k - 2 (2 for one source)."""

    parts: list[int]
    whole: int
    slack: int


def _parts(shares: Sequence[float]) -> _Parts:
    """The shares of k sources rounded to about k 2^-60, and never to 0. Raises ValueError for what is no share."""
    if not shares or not all(share > 0 and math.isfinite(share) for share in shares):
        raise ValueError(f"{list(shares)} are no shares; each must be above 0")
    slack = max(2 * len(shares) - 2, 2)
    unit = (1 << _BITS) // (slack + 1) - len(shares)
    total = sum(map(Fraction, shares))
    parts = [max(int(Fraction(share) / total * unit), 1) for share in shares]
    # What rounding down has left over is less than one part a source.
    largest = parts.index(max(parts))
    parts[largest] += max(unit - sum(parts), 0)
    return _Parts(parts, sum(parts), slack)


def _latest(source: int, parts: _Parts, draw: int) -> int:
    """The last turn (from 1) in which the draw (from 1) of a source can stand."""
    return (parts.slack * draw - 1) * parts.whole // (parts.slack * parts.parts[source]) + 1


def _floors(multiples: Ints, less: int, parts: _Parts, source: int) -> Ints:
    """(multiples * whole - less) // (slack * part of the source), exactly, though the products overflow int64.

    Floats give the quotient to within one. What is left over then is smaller than 2^63, so that int64, which counts
    modulo 2^64, holds it exactly.
    """
    divisor = parts.slack * parts.parts[source]
    guess: Ints = np.floor(multiples * (parts.whole / divisor)).astype(np.int64)
    left: Ints = multiples * np.int64(parts.whole) - guess * np.int64(divisor) - less
    guess += (left >= divisor).astype(np.int64) - (left < 0)
    return guess


def _turns(parts: _Parts, drawn: Sequence[int], count: int) -> Turns:
    """The next `count` turns after each source was drawn so often.

    A draw has a window of turns in which it keeps to the bound, and of the draws whose window has begun the one whose
    window ends first comes next (Tijdeman; ties by the number of the source). Sorted by the ends of the windows, the
    draws stand in their turns already, but for those that would come before their window begins.
    """
    done = sum(drawn)
    begins, keys, sources = [], [], []
    for source, before in enumerate(drawn):
        most = (done + count) * parts.parts[source] // parts.whole + 1
        draws = np.arange(before + 1, most + 1)
        begins.append(_floors(parts.slack * (draws - 1) + 1, 1, parts, source) + 1 - done)
        keys.append((_floors(parts.slack * draws - 1, 0, parts, source) + 1 - done) * len(drawn) + source)
        sources.append(np.full(len(draws), source, np.int16))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return _begun(np.concatenate(begins)[order], np.concatenate(sources)[order], count)


def _begun(begins: Ints, sources: Turns, count: int) -> Turns:
    """The sources of `count` turns: in each the first draw that is left and whose window has begun."""
    turns = sources[:count].copy()
    early = np.flatnonzero(begins[:count] > np.arange(1, count + 1)).tolist()
    begin, turn = begins.tolist() if early else [], 0
    for place in early:
        if place < turn:
            continue
        held, turn, following = [place], place, place + 1
        while held and turn < count:
            turn += 1
            chosen = next((draw for draw in held if begin[draw] <= turn), None)
            if chosen is None:
                while begin[following] > turn:
                    held.append(following)
                    following += 1
                chosen, following = following, following + 1
            else:
                held.remove(chosen)
            turns[turn - 1] = sources[chosen]
    return turns
