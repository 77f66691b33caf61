"""One log, read piece by piece: its lines with their times, from wherever one wants to begin."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sft_dist.render.text import reveal

_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ")
# What torch puts before the lines of an exception.
_TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16
_LONGEST_UNIT = 500


@dataclass
class Unit:
    """A line of a log with those that belong to it: a traceback stays together.

    `source` is the rank, or a negative number for what is no rank's. `at`: seconds since the epoch, None where the
    log has no times. `order`: as `at`, but never falling within a log.
    """

    source: int
    at: float | None
    order: float
    lines: list[str] = field(default_factory=list)

    @property
    def is_traceback(self) -> bool:
        return _TRACEBACK in self.lines


class LogReader:
    """A log from byte `offset` on. It is opened for each piece anew, for there may be more ranks than open files."""

    def __init__(self, path: Path, source: int, offset: int = 0) -> None:
        self.path, self.source = path, source
        self._offset = offset
        self._partial = b""
        self._cuts = False
        self._seen_partial = b""
        self._last: float | None = None
        self._unit: Unit | None = None
        self._has_exception = False
        self._is_old = False

    def units(self, *, final: bool) -> Iterator[Unit]:
        """What there is now. `final`: an unfinished line or traceback at the end, too, else when it has waited once."""
        while chunk := self._chunk():
            for line in self._lines(chunk):
                yield from self._take(line)
        if self._partial and (final or self._partial == self._seen_partial):
            line, self._partial = self._partial, b""
            yield from self._take(line)
        self._seen_partial = self._partial
        if self._unit is not None and (final or self._is_old or not self._unit.is_traceback):
            yield self._unit
            self._unit = None
        self._is_old = self._unit is not None

    def _chunk(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    # It was written anew.
                    self._offset, self._partial = 0, b""
                file.seek(self._offset)
                chunk = file.read(_CHUNK)
        except OSError:
            return b""
        self._offset += len(chunk)
        return chunk

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            if not self._cuts:
                yield self._partial + line
            self._partial, self._cuts = b"", False
        if self._cuts:
            return
        self._partial += tail
        if len(self._partial) > _LONGEST_LINE:
            stamp = _STAMP.match(self._partial)
            head, bar, state = self._partial.rpartition(b"\r")
            if bar and len(state) < _LONGEST_LINE // 2:
                # Only the newest state of a progress bar is ever shown.
                self._partial = (stamp[0] if stamp else b"") + head.rpartition(b"\r")[2][-1000:] + bar + state
            else:
                yield self._partial + b" ..."
                self._partial, self._cuts = b"", True

    def _take(self, line: bytes) -> Iterator[Unit]:
        """The unit that ends where this line begins."""
        stamp = _STAMP.match(line)
        at = _time(stamp[1]) if stamp else None
        text = _shown(line[stamp.end() :] if stamp and at is not None else line)
        unit = self._unit
        if unit is not None and len(unit.lines) < _LONGEST_UNIT and self._belongs(unit, at, text):
            unit.lines.append(text)
            return
        if unit is not None:
            yield unit
        self._has_exception = False
        if at is not None:
            self._last = max(at, self._last or at)
        time = at if at is not None else self._last
        self._unit = Unit(self.source, time, float("-inf") if self._last is None else self._last, [text])

    def _belongs(self, unit: Unit, at: float | None, text: str) -> bool:
        if at is None and unit.at is not None:
            return True
        if not unit.is_traceback:
            return False
        if text == _TRACEBACK or text in _CHAINED:
            self._has_exception = False
            return True
        if not text or text[0] in " \t":
            return not self._has_exception or not text
        # The line that names the exception is the first that is not indented.
        belongs, self._has_exception = not self._has_exception, True
        return belongs


def last_lines(path: Path, count: int) -> int:
    """The offset from which on a file has its last `count` lines; 0 for one that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        # The end of the last line does not begin another.
        missing = count + (file.read(1) == b"\n")
        while end > 0:
            begin = max(0, end - _CHUNK)
            file.seek(begin)
            chunk = file.read(end - begin)
            found = chunk.count(b"\n")
            if found >= missing:
                at = len(chunk)
                for _ in range(missing):
                    at = chunk.rindex(b"\n", 0, at)
                return begin + at + 1
            missing -= found
            end = begin
    return 0


def since(path: Path, at: float) -> int:
    """An offset before which no line is as new as `at`, by bisection; a log without times is taken whole."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while high - low > _CHUNK:
            middle = (low + high) // 2
            file.seek(middle)
            chunk = file.read(_CHUNK)
            found = re.search(rb"\n" + _STAMP.pattern, chunk)
            time = _time(found[1]) if found else None
            if time is None or found is None or time >= at:
                high = middle
            else:
                low = middle + found.start() + 1
        return low
    return 0


def _time(text: bytes) -> float | None:
    try:
        return datetime.fromisoformat(text.decode()).timestamp()
    except ValueError:
        return None


_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links
    r"|\x1b[P^_X][^\x1b]*(?:\x1b\\)?"
    r"|\x1b[@-Z\\-_]"
)


def _shown(line: bytes) -> str:
    """A line as it would stand on a terminal: a progress bar's newest state, and no control characters."""
    text = line.decode("utf-8", errors="replace")
    # Most lines hold nothing of the kind, and there are millions.
    if not (text.isascii() and text.isprintable()):
        text = reveal(_ESCAPES.sub("", text.rstrip("\r").rpartition("\r")[2]))
    return _TORCH_PREFIX.sub("", text).rstrip() if text.startswith("[rank") else text.rstrip()
