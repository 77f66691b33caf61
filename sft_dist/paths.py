"""Where things lie on this machine, and the locks that guard them. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The folder of prepared data and converted models: `SFT_DIST_CACHE`, or one in the user's cache."""
    own = os.environ.get("SFT_DIST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(own or f"{base}/sft-dist").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to `path`, waiting for another process of this node to let go.

    The kernel frees it when its holder dies, so a killed process leaves no stale lock.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(path.with_name(path.name + ".lock")):
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock that belongs to `path` if no other process does; gives whether it is ours."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
