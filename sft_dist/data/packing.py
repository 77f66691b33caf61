"""Which documents share a packed row: a function of the lengths, the capacity, the seed and the buffer alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Documents that are packed together. The more there are, the nearer a row comes to full, and the fewer there are, the
# less memory is needed; 2^20 need about 100 MB whatever the size of the data.
BUFFER = 2**20
# One row in so many above the lower bound is left alone: to look for it costs more than it brings.
NEAR = 2000
# Shares of the capacity above which, up to a half, documents go in pairs (see `_fitted`); tried in turn.
THRESHOLDS = tuple(Fraction(24 - step, 48) for step in range(8))

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Packed rows: row i holds the documents `rows[starts[i]:starts[i+1]]`, in that order."""

    rows: Ints  # (documents,)
    starts: Ints  # (rows + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> Ints:
        i = range(len(self))[i]
        return self.rows[self.starts[i] : self.starts[i + 1]]


def pack(lengths: ArrayLike, capacity: int, *, seed: int, buffer: int = BUFFER) -> Packs:
    """Rows of whole documents, at most `capacity` tokens each; every document is in one row, once.

    `lengths` are tokens per document, (documents,). The seed permutes the documents, which are cut into buffers of
    like size, at most `buffer` documents each. Each buffer is packed by itself, so that chance alone decides which
    documents can meet; which of them do meet, their lengths decide. The rows of a buffer, and the documents of a row,
    come in an order that is drawn, for a row sorted by length would show the model long documents first.

    Documents of a length that is rare find the same company at every seed while one buffer holds all the data: a
    quarter of the rows of 2,000 documents, a hundredth of those of 100,000 (log-normal, capacity 2048). A smaller
    buffer leaves more to chance and less of each row full.

    A buffer takes no more rows than best-fit-decreasing would. Time grows linearly with the number of documents, for
    the loops in Python run over the distinct lengths of a buffer.

    Raises ValueError where a document has no token or more than `capacity`; it names the document's index.
    """
    checked = _checked(lengths, capacity)
    if buffer < 1:
        raise ValueError(f"buffer is {buffer}; it is a number of documents, at least 1")
    generator = np.random.Generator(np.random.PCG64(seed))
    order = generator.permutation(len(checked))
    rows, sizes = np.empty_like(order), [np.zeros(1, np.int64)]
    buffers = -(-len(order) // buffer)
    for number in range(buffers):
        here = slice(number * len(order) // buffers, (number + 1) * len(order) // buffers)
        places, documents = _pack_buffer(checked[order[here]], capacity, generator)
        rows[here] = order[here][places]
        sizes.append(documents)
    return Packs(rows, np.cumsum(np.concatenate(sizes)))


def fill(packs: Packs, lengths: ArrayLike, capacity: int) -> float:
    """The share of the rows' tokens that are documents', 0 to 1; 1 where there is no row."""
    if not len(packs):
        return 1.0
    return int(np.asarray(lengths)[packs.rows].sum()) / (len(packs) * capacity)


def lower_bound(lengths: ArrayLike, capacity: int) -> int:
    """Rows that no packing of whole documents can do without; the fewest possible may be more.

    The bound L2 of Martello and Toth (Discrete Applied Mathematics 28, 1990), which counts besides the tokens that
    documents of more than half the capacity share no row with each other.
    """
    return _lower_bound(np.bincount(_checked(lengths, capacity), minlength=capacity + 1))


def _checked(lengths: ArrayLike, capacity: int) -> Ints:
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it is a number of tokens, at least 1")
    given = np.asarray(lengths)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"lengths are one whole number per document, not {given.dtype} of shape {given.shape}")
    wrong = np.flatnonzero((given < 1) | (given > capacity))
    if wrong.size:
        raise ValueError(f"document {wrong[0]} has {given[wrong[0]]} tokens; a row takes 1 to {capacity}")
    return given.astype(np.int64)


def _pack_buffer(lengths: Ints, capacity: int, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """The buffer's documents row after row, as places in the buffer, and the number of documents in each row."""
    plan = _plan(np.bincount(lengths, minlength=capacity + 1), capacity)
    row = _rows_of_documents(plan, lengths, capacity)
    # Plans deal the documents of a length out in turn, so that in the buffer's own order a row's long documents would
    # tend to come after its short ones. Hence a second permutation.
    row = generator.permutation(plan.rows)[row]
    drawn = generator.permutation(len(row))
    return drawn[np.argsort(row[drawn], kind="stable")], np.bincount(row)


@dataclass(frozen=True)
class _Plan:
    """How many rows there are and what lies in them, told by length: no document has a name yet.

    A step (length, first, rows, copies) puts so many documents of the length into each row of first .. first+rows-1.
    """

    steps: list[tuple[int, int, int, int]]
    rows: int


def _rows_of_documents(plan: _Plan, lengths: Ints, capacity: int) -> Ints:
    """The row of each document of the buffer, (documents,): those of a length take the plan's places in turn."""
    steps = np.array(plan.steps, np.int64)
    first, rows, copies = steps[np.argsort(steps[:, 0], kind="stable"), 1:].T
    places = rows * copies
    number = np.arange(len(lengths)) - np.repeat(np.cumsum(places) - places, places)  # of the place in its step
    by_length = np.argsort(lengths.astype(np.min_scalar_type(capacity)), kind="stable")  # 16 bits: radix, linear time
    row = np.empty_like(lengths)
    row[by_length] = np.repeat(first, places) + number // np.repeat(copies, places)
    return row


def _plan(counts: Ints, capacity: int) -> _Plan:
    """The plan of fewest rows among best-fit-decreasing and, where that leaves something to gain, `_fitted`."""
    best, bound = _best_fit_decreasing(counts, capacity), _lower_bound(counts)
    for threshold in THRESHOLDS:
        if best.rows - bound <= bound // NEAR:
            break
        best = min(best, _fitted(counts, capacity, threshold), key=lambda plan: plan.rows)
    return best


def _lower_bound(counts: Ints) -> int:
    """`lower_bound` from the number of documents of each length, (capacity + 1,)."""
    capacity = len(counts) - 1
    length = np.arange(capacity + 1)
    documents = np.concatenate([[0], np.cumsum(counts)])  # those shorter than i
    tokens = np.concatenate([[0], np.cumsum(counts * length)])
    # For each limit: whatever is longer than capacity - limit shares no row with what is left to count; what else is
    # longer than a half has a row of its own; into what these leave, and into more rows, goes the rest.
    half = capacity // 2 + 1
    limit = np.arange(half)
    alone, above = documents[capacity + 1] - documents[capacity - limit + 1], capacity - limit + 1
    halves = documents[above] - documents[np.minimum(half, above)]
    room = halves * capacity - (tokens[above] - tokens[np.minimum(half, above)])
    rest = tokens[half] - tokens[limit]
    return int((alone + halves + np.maximum(0, -((room - rest) // capacity))).max())


def _best_fit_decreasing(counts: Ints, capacity: int) -> _Plan:
    """Longest documents first, each into the fullest row that has room for it.

    Rows with the same room left are alike. They are kept as ranges of row numbers by that room, and a step fills as
    many of a range as the documents of a length suffice for, so that the loop runs over lengths and ranges.
    """
    steps: list[tuple[int, int, int, int]] = []
    rooms: list[int] = []  # ascending, those that some row has
    ranges: dict[int, list[tuple[int, int]]] = {}  # by room: first row, number of rows
    rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect_left(rooms, length)
            is_new = place == len(rooms)
            room = capacity if is_new else rooms[place]
            first, alike = (rows, left) if is_new else ranges[room].pop()
            # A row is filled with copies until none fits: it stays the fullest with room all the while.
            copies = min(room // length, left)
            used = min(alike, left // copies)
            steps.append((length, first, used, copies))
            left -= used * copies
            if is_new:
                rows += used
            elif used < alike:
                ranges[room].append((first + used, alike - used))
            elif not ranges[room]:
                rooms.pop(place)
                del ranges[room]
            if rest := room - copies * length:
                if rest not in ranges:
                    ranges[rest] = []
                    insort(rooms, rest)
                ranges[rest].append((first, used))
    return _Plan(steps, rows)


def _fitted(counts: Ints, capacity: int, threshold: Fraction) -> _Plan:
    """Longest documents first, each row filled to the last token if one or two more documents can do it.

    Of the pairs that fill a row, the one of most even lengths is taken: it leaves the short documents to rows that
    nothing else would fill. Failing that, the longest document that fits is put in, and the search goes on. A row so
    found is made as often as there are documents for it.

    Documents longer than `threshold` of the capacity, up to a half, take the next longest for company first. Without
    it, short documents are spent on triples that are full, and of what stays only two fit a row, with a large gap.
    """
    steps: list[tuple[int, int, int, int]] = []
    stock = _Stock(counts, capacity)
    rows = 0
    while longest := stock.longest(capacity):
        row: dict[int, int] = {}
        room = capacity
        for length in _filling(stock, longest, capacity, threshold):
            stock.take(length, 1)
            row[length] = row.get(length, 0) + 1
            room -= length
        again = min(stock.counts[length] // copies for length, copies in row.items())
        for length, copies in row.items():
            stock.take(length, again * copies)
            steps.append((length, rows, 1 + again, copies))
        rows += 1 + again
    return _Plan(steps, rows)


def _filling(stock: _Stock, longest: int, capacity: int, threshold: Fraction) -> Iterator[int]:
    """Lengths that make up a row, one after the other; each is taken from the stock before the next is asked for."""
    yield longest
    room = capacity - longest
    if threshold * capacity < longest and 2 * longest <= capacity and (length := stock.longest(room)):
        yield length
        room -= length
    while length := stock.longest(room):
        pair = stock.pair(room) if length < room else None
        for chosen in pair or (length,):
            yield chosen
            room -= chosen


class _Stock:
    """Documents left, by length, with sets of lengths as bits of one integer, where a search is one operation."""

    def __init__(self, counts: Ints, capacity: int) -> None:
        self.capacity = capacity
        self.counts: list[int] = counts.tolist()
        present = np.flatnonzero(counts)
        self.lengths = _bits(present, capacity)  # bit i: there is a document of i tokens
        self.gaps = _bits(capacity - present, capacity)  # bit i: there is one of capacity - i

    def take(self, length: int, number: int) -> None:
        self.counts[length] -= number
        if number and not self.counts[length]:
            self.lengths ^= 1 << length
            self.gaps ^= 1 << (self.capacity - length)

    def longest(self, room: int) -> int:
        """The longest length that fits the room; 0 if there is none."""
        fitting = self.gaps >> (self.capacity - room)
        return room - _lowest(fitting) if fitting else 0

    def pair(self, room: int) -> tuple[int, int] | None:
        """The two lengths, as even as may be, that fill the room."""
        half = (room + 1) // 2
        longer = (self.lengths >> half) & (self.gaps >> (self.capacity - room + half))  # bit i: half + i has a partner
        if room % 2 == 0 and self.counts[half] < 2:
            longer &= -2
        if not longer:
            return None
        length = half + _lowest(longer)
        return length, room - length


def _bits(places: Ints, highest: int) -> int:
    flags = np.zeros(highest + 1, np.uint8)
    flags[places] = 1
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _lowest(bits: int) -> int:
    """The place of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
