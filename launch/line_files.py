"""Files of lines: the end of one that may be long, and one more line for one that others may write as well."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def end_of(path: Path, most_bytes: int, start: int = 0) -> bytes:
    """The last bytes of a file from byte `start` on, its first line perhaps not whole; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - most_bytes))
            return file.read()
    except OSError:
        return b""


def add_line(path: Path, line: str) -> None:
    """Add a line, in one write and without a lock: a home on NFS may have none. Raises :class:`OSError`.

    What a writer that was killed left unfinished becomes a line of its own, which readers pass over. The file is its
    owner's alone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        text = b"\n" * torn + line.encode() + b"\n"
        if os.write(descriptor, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
