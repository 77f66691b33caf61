"""Many logs as one: in the order of time, and what several ranks say alike said once."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from launch.logs.reading import Unit

# Of lines that are alike. Ranks run in step, and their nodes' clocks differ by less.
_SECONDS = 2.0


@dataclass
class Said:
    """Lines that the `sources` have said alike, the first of them `at` that time."""

    at: float | None
    sources: list[int]
    lines: list[str]
    number: int = field(default=0, repr=False)


def merged(logs: Iterable[Iterator[Unit]]) -> Iterator[Unit]:
    """All units in the order of time; logs without times come first and whole, one after another."""
    return heapq.merge(*logs, key=lambda unit: unit.order)


class Folding:
    """Holds what was said of late until it is known who else says it."""

    def __init__(self) -> None:
        self._held: deque[Said] = deque()
        self._newest: dict[tuple[str, ...], Said] = {}
        self._last_of: dict[int, int] = {}
        self._count = 0

    def add(self, unit: Unit) -> Iterator[Said]:
        """Take the next unit; gives what nobody can join any more."""
        if unit.at is None:
            yield from self.rest()
            yield Said(None, [unit.source], unit.lines)
            return
        yield from self.older_than(unit.order - _SECONDS)
        key = tuple(unit.lines)
        same = self._newest.get(key)
        # A rank's own lines keep their order, and one that it repeats is shown again.
        if same is not None and unit.source >= 0 and self._last_of.get(unit.source, -1) < same.number:
            same.sources.append(unit.source)
            self._last_of[unit.source] = same.number
            return
        self._count += 1
        said = Said(unit.at, [unit.source], unit.lines, self._count)
        self._held.append(said)
        self._last_of[unit.source] = said.number
        if unit.source >= 0:
            self._newest[key] = said

    def older_than(self, at: float) -> Iterator[Said]:
        """What was said before, in order."""
        while self._held and (self._held[0].at or 0.0) < at:
            yield self._release()

    def up_to(self, number: int) -> Iterator[Said]:
        """The first so many that were ever held, as far as they are held still."""
        while self._held and self._held[0].number <= number:
            yield self._release()

    @property
    def count(self) -> int:
        """How many were ever held."""
        return self._count

    def rest(self) -> Iterator[Said]:
        while self._held:
            yield self._release()

    def _release(self) -> Said:
        said = self._held.popleft()
        key = tuple(said.lines)
        if self._newest.get(key) is said:
            del self._newest[key]
        return said


def folded(units: Iterable[Unit]) -> Iterator[Said]:
    """All units, folded."""
    folding = Folding()
    for unit in units:
        yield from folding.add(unit)
    yield from folding.rest()
