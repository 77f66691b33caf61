"""What the processes of a stage print, to the terminal with the stage's name in front, and into a log of its own."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from types import TracebackType

from sft_dist.errors import UserError

_PATIENCE_SECONDS = 5.0


class Tee:
    """Within `with`, the descriptors 1 and 2 of this process, which its children inherit, lead to terminal and log.

    On the terminal each line has `NAME | ` in front, and of a progress bar its last state. The log, which is appended
    to and its owner's alone, has every byte. Neither a full disk nor a terminal that has gone away holds anybody up.
    Raises :class:`UserError` where the log cannot be opened.
    """

    def __init__(self, name: str, log: Path) -> None:
        self._prefix = f"{name} | ".encode()
        self._path = log

    def __enter__(self) -> Tee:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._log = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}; name another output_dir") from error
        sys.stdout.flush()
        sys.stderr.flush()
        self._before = {number: os.dup(number) for number in (1, 2)}
        source, sink = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, args=(source,), name="tee", daemon=True)
        self._thread.start()
        for number in self._before:
            os.dup2(sink, number)
        os.close(sink)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        for number, saved in self._before.items():
            os.dup2(saved, number)
        # What still holds the pipe then is no process of the stage.
        self._thread.join(_PATIENCE_SECONDS)
        if not self._thread.is_alive():
            for descriptor in (*self._before.values(), self._log):
                os.close(descriptor)

    def _pass_on(self, source: int) -> None:
        rest = b""
        with os.fdopen(source, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                _write(self._log, chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                self._show(lines)
        self._show([rest] if rest else [])

    def _show(self, lines: list[bytes]) -> None:
        shown = (line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines)
        _write(self._before[1], b"".join(self._prefix + line + b"\n" for line in shown))


def _write(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]
