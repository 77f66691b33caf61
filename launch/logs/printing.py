"""Lines of many ranks on a terminal or in a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache

from launch.logs.failure import Failure
from launch.logs.merging import Said
from launch.logs.places import JOB, RUN, clock
from sft_dist.render.text import reveal

_COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_WIDEST = 14


class ReaderGoneError(Exception):
    """Whoever reads, such as `head`, has seen enough."""


class Printer:
    """Writes lines with their time and their ranks before them; `ranks` are those known at the beginning."""

    def __init__(self, ranks: Sequence[int], colour: bool) -> None:
        self._colour = colour
        self._day = self._hour = ""
        self._second = -1
        self._head = lru_cache(4096)(self._head_of)
        self._width = max(len(_label([rank])) for rank in [*ranks, JOB])
        if len(ranks) > 1:
            self._width = max(self._width, len(_label(ranks)))

    def said(self, said: Said) -> None:
        time = self._time(said.at) if said.at is not None else ""
        head = f"{time}{self._head(tuple(sorted(said.sources)))} "
        for line in said.lines:
            self.line((head + line).rstrip())

    def _time(self, at: float) -> str:
        """The hour, after a line with the date where it is another."""
        second = int(at)
        if second != self._second:
            self._second, moment = second, clock(second)
            self._hour = self._dim(f"{moment:%H:%M:%S} ")
            day = f"{moment:%Y-%m-%d, UTC%z}"
            if day != self._day:
                self._day = day
                self.line(self._dim(f"--- {day} ---"))
        return self._hour

    def failure(self, failure: Failure) -> None:
        """What went wrong first, and what it said."""
        others = f"; {failure.others} more failed after it" if failure.others else ""
        at = _clock_of(failure.at)
        head = f"first error: rank {failure.rank} on {reveal(failure.node)}, {at}: {failure.cause}{others}"
        self.line(self._code(head, "1;31"))
        if failure.words and failure.reason is None:
            self.line("its last lines, which may have nothing to do with it:")
        for line in failure.words:
            self.line(f"  {line}")
        self.line("")

    def note(self, text: str) -> None:
        self.line(self._dim(text))

    def line(self, text: str) -> None:
        """Raises :class:`ReaderGoneError`."""
        try:
            print(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError as error:
            raise ReaderGoneError from error

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ReaderGoneError from error

    def _head_of(self, sources: tuple[int, ...]) -> str:
        label = _label(sources)
        # Ranks may come that were not there at the beginning.
        if len(label) > self._width:
            self._width = len(label)
            self._head.cache_clear()
        return f"{self._tint(label.ljust(self._width), sources)} {self._dim('|')}"

    def _tint(self, label: str, sources: Sequence[int]) -> str:
        if len(sources) > 1:
            return self._code(label, "1")
        return self._code(label, str(_COLOURS[sources[0] % len(_COLOURS)]) if sources[0] >= 0 else "1;34")

    def _dim(self, text: str) -> str:
        return self._code(text, "2")

    def _code(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text


def close_quietly() -> None:
    """Python would complain once more at its end of a reader that has gone."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def stretches(ranks: Iterable[int]) -> str:
    """Ranks in order, as `0-3,7`."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def _label(sources: Sequence[int]) -> str:
    if len(sources) == 1:
        return {JOB: "job", RUN: "run"}.get(sources[0], f"rank {sources[0]}")
    text = f"ranks {stretches(sources)}"
    return text if len(text) <= _WIDEST else f"{len(sources)} ranks"


def _clock_of(at: str) -> str:
    from launch.slurm.records import seconds

    try:
        return f"{clock(seconds(at)):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return reveal(at)
