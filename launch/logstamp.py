"""What writes a rank's log: each line with the time of its arrival. Run as a script, by an isolated interpreter.

`logstamp.py FILE` copies its standard input to the end of FILE, each line begun with `2026-11-25T17:01:02.123456Z `.
A carriage return begins no line. A line whose end does not come within a second is written as far as it goes, and
what follows is added to it without a time: a file is always lines that begin with a time, of which the last may be
unfinished.

One thread reads and another writes, so that the worker never waits for a disk that is slow, full or away. What cannot
be held or written is lost and counted, and the number is said in the log as soon as it can be written again. Signals
to stop are ignored: the worker has last words, and its end is the end of the input.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time

_READ_BYTES = 1 << 16
_MOST_HELD = 16 << 20
_PARTIAL_SECONDS = 1.0
_RETRY_SECONDS = 1.0
# For a writer that hangs at the end of the input.
_LAST_SECONDS = 10.0


class Stamper:
    """Puts times before lines. `add` and `rest` return what can be written; `waits` while a line is held back."""

    def __init__(self) -> None:
        self._held = b""
        self._stamp = b""
        # Whether the beginning of the line that is under way has been given out already.
        self._is_begun = False

    @property
    def waits(self) -> bool:
        return bool(self._held)

    def add(self, chunk: bytes, at: float) -> bytes:
        """`at`: seconds since the epoch. A line has the time of its first byte."""
        stamp = stamp_of(at)
        if not self._held and not self._is_begun:
            self._stamp = stamp
        *lines, tail = chunk.split(b"\n")
        if not lines:
            self._held += tail
            return self.rest() if len(self._held) >= _READ_BYTES else b""
        first = (b"" if self._is_begun else self._stamp) + self._held + lines[0] + b"\n"
        self._held, self._stamp, self._is_begun = tail, stamp, False
        return first + b"".join([stamp + line + b"\n" for line in lines[1:]])

    def rest(self) -> bytes:
        """The unfinished line as far as it is known; what comes later is added to it."""
        if not self._held:
            return b""
        text = (b"" if self._is_begun else self._stamp) + self._held
        self._held, self._is_begun = b"", True
        return text


def stamp_of(at: float) -> bytes:
    """A time as it stands before a line, with the blank behind it."""
    micro = int(at * 1_000_000)
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micro // 1_000_000))
    return f"{second}.{micro % 1_000_000:06d}Z ".encode()


class Log:
    """The end of a file, its owner's alone. A full disk, or one that is away, loses lines and nothing else."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._ends_line = True
        self._looked = 0.0
        self._lost = 0
        self._why = ""
        self._is_told = False

    @property
    def owes(self) -> bool:
        """Whether there is a loss that could not be said yet."""
        return self._lost > 0

    def write(self, text: bytes, lost: int = 0) -> None:
        """Add text. `lost`: bytes before it that were given up. Raises nothing."""
        self._lost += lost
        rest = text
        try:
            self._look()
            if self._lost:
                self._note()
            while rest:
                rest = rest[self._put(rest) :]
        except OSError as error:
            self._lost += len(rest)
            self._why = error.strerror or str(error)
            self._close()
            self._tell()

    def _look(self) -> None:
        """Have the file open; one that was removed meanwhile is made again, lest lines go where nobody finds them."""
        now = time.monotonic()
        if self._descriptor is not None and now - self._looked >= _RETRY_SECONDS:
            self._looked = now
            mine = os.fstat(self._descriptor)
            try:
                there: os.stat_result | None = os.lstat(self._path)
            except FileNotFoundError:
                there = None
            if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
                self._close()
        if self._descriptor is None:
            self._open()
            self._looked = now

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self._path) or ".", mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        os.fchmod(self._descriptor, 0o600)
        size = os.fstat(self._descriptor).st_size
        # A writer before this one may have been killed in the middle of a line, and a full disk leaves half of one.
        self._ends_line = size == 0 or os.pread(self._descriptor, 1, size - 1) == b"\n"
        if not self._ends_line:
            self._put(b"\n")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _put(self, text: bytes) -> int:
        assert self._descriptor is not None
        written = os.write(self._descriptor, text)
        self._ends_line = text[written - 1 : written] == b"\n"
        return written

    def _note(self) -> None:
        why = self._why or "the disk was too slow"
        note = stamp_of(time.time()) + f"sft-dist: {self._lost} bytes of this log are lost here: {why}\n".encode()
        note = b"\n" * (not self._ends_line) + note
        if self._put(note) != len(note):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._lost, self._why = 0, ""

    def _tell(self) -> None:
        """Say it once where the job's own output goes."""
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(OSError):
                print(f"sft-dist: {self._path} cannot be written: {self._why}; lines are lost", file=sys.stderr)


class Queue:
    """Text on its way from the reader to the writer: bounded, so that neither waits for the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[bytes] = []
        self._bytes = self._lost = 0
        self._is_closed = False

    def put(self, text: bytes) -> None:
        with self._changed:
            # Once something is lost the rest follows, until there is room, so that the note stands where the gap is.
            if self._lost or self._bytes + len(text) > _MOST_HELD:
                self._lost += len(text)
            elif text:
                self._parts.append(text)
                self._bytes += len(text)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take(self, seconds: float | None) -> tuple[bytes, int, bool]:
        """All that is there, the bytes lost behind it, and whether no more will come; waits for so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._lost or self._is_closed, seconds)
            text, lost = b"".join(self._parts), self._lost
            self._parts, self._bytes, self._lost = [], 0, 0
            return text, lost, self._is_closed


def write(queue: Queue, log: Log) -> None:
    """Write what comes, to the end."""
    is_closed = False
    while not is_closed:
        text, lost, is_closed = queue.take(_RETRY_SECONDS if log.owes else None)
        if text or log.owes:
            log.write(text)
        if lost:
            log.write(b"", lost)


def read(descriptor: int, queue: Queue) -> None:
    """Stamp what comes in, to the end of it."""
    stamper = Stamper()
    deadline: float | None = None
    while True:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if select.select([descriptor], [], [], patience)[0]:
            chunk = os.read(descriptor, _READ_BYTES)
            if not chunk:
                break
            if text := stamper.add(chunk, time.time()):
                queue.put(text)
        else:
            queue.put(stamper.rest())
        if not stamper.waits:
            deadline = None
        elif deadline is None or time.monotonic() >= deadline:
            deadline = time.monotonic() + _PARTIAL_SECONDS
    queue.put(stamper.rest())
    queue.close()


def main(path: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    queue = Queue()
    writer = threading.Thread(target=write, args=(queue, Log(path)), daemon=True)
    writer.start()
    read(0, queue)
    writer.join(_LAST_SECONDS)
    # A thread that hangs in a write would hold up the interpreter's own end.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
