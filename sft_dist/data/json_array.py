"""The elements of a JSON array, one after the other, in memory for one element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters
# A number, a literal or an escape that the end of a chunk cuts in two is complained of so far before that end.
_NEAR_END = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER = re.compile(r"[ \t\n\r,\]]")  # what comes behind an element


class BrokenArray(Exception):
    """What is wrong at which line and column, both counted from 1."""

    def __init__(self, said: str, line: int, column: int) -> None:
        super().__init__(said)
        self.said, self.line, self.column = said, line, column


def elements(text: TextIO, chunk: int = CHUNK) -> Iterator[Any]:
    """The elements of the array that `text` holds. Raises :class:`BrokenArray`."""
    reader = _Reader(text, chunk)
    reader.take("[", "Expecting value")
    if reader.peek() == "]":
        reader.take("]", "")
    else:
        yield reader.value()
        while reader.peek() != "]":
            reader.take(",", "Expecting ',' delimiter")
            yield reader.value()
        reader.take("]", "")
    if reader.peek():
        raise reader.broken("Extra data", reader.at)


class _Reader:
    """A window on the text; `at` is the place in it that comes next."""

    def __init__(self, text: TextIO, chunk: int) -> None:
        self.text, self.chunk = text, chunk
        self.window, self.at, self.ended = "", 0, False
        self.lines, self.columns = 0, 0  # before the window
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.window, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.more():
                return ""

    def take(self, character: str, said: str) -> None:
        if self.peek() != character:
            raise self.broken(said, self.at)
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.window) - _NEAR_END
                if not (cut and self.more()):
                    raise self.broken(error.msg, error.pos) from error
                continue
            except RecursionError as error:
                raise self.broken("nested too deeply", self.at) from error
            except ValueError as error:  # a number of thousands of digits
                raise self.broken(str(error), self.at) from error
            # Of a number, the first digits are a number, too.
            whole = _AFTER.match(self.window, end) or end < len(self.window) - _NEAR_END
            if whole or not self.more():
                self.at = end
                return value

    def more(self) -> bool:
        """Move the window on: drop what lies before `at`, and double what is left, at least by a chunk.

        False at the end of the text, where nothing is moved.
        """
        read = "" if self.ended else self.text.read(max(self.chunk, len(self.window) - self.at))
        if not read:
            self.ended = True
            return False
        passed, self.window, self.at = self.window[: self.at], self.window[self.at :], 0
        newlines = passed.count("\n")
        self.lines += newlines
        self.columns = len(passed) - passed.rfind("\n") - 1 + (0 if newlines else self.columns)
        self.window += read
        return True

    def broken(self, said: str, at: int) -> BrokenArray:
        before = self.window[:at]
        newlines = before.count("\n")
        column = at - before.rfind("\n") + (0 if newlines else self.columns)
        return BrokenArray(said, self.lines + newlines + 1, column)
