"""The lock on a run's folder: no second run in it while the first lives, and no folder lost to a run that died.

The lock is a file that says who holds it. Its holder gives a sign of life by its modification time. On the holder's
own machine the kernel is asked whether the process still exists; elsewhere the sign of life decides, by the clock of
the file system. Only what any shared file system does in one step is relied on: creating a file that must not exist,
and renaming one. This module is free of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from sft_dist.errors import UserError

FILE_NAME = "run.lock"
HEARTBEAT_SECONDS = 5.0
# Of silence, after which a run that cannot be asked for counts as ended.
STALE_SECONDS = 60.0
_MOST_BYTES = 16 * 1024
_POLL_SECONDS = 0.5
# Each is lost to a run that took the lock and gave it back within a few system calls.
_TRIES = 100
_ENDED = ("Z", "X", "x")


class RunLock:
    """The lock of the run in `root`, held between :meth:`acquire` and :meth:`release`, or within `with`.

    `replaced` is one line about the run whose lock was taken over, None where there was none. A process that is
    stopped for longer than `stale_seconds` may lose its lock to another machine; :meth:`is_held` tells. Another run
    that holds it is given `wait_seconds` to end.
    """

    def __init__(
        self,
        root: Path,
        command: str = "sft-dist run",
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        wait_seconds: float = 0.0,
    ) -> None:
        self.root = root
        self.replaced: str | None = None
        # The process may change its folder while it holds the lock.
        self._file = root.absolute() / FILE_NAME
        self._command = command
        self._heartbeat = heartbeat_seconds
        self._stale = stale_seconds
        self._wait = wait_seconds
        self._mine = b""
        self._pid = 0
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, making the folder if need be. Raises :class:`UserError` where another run holds it."""
        holder = _Holder.this_process(self._command)
        mine = holder.model_dump_json(indent=2).encode() + b"\n"
        with _told(self.root):
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            stale = self._taken(mine)
        self._mine, self._pid, self._ended = mine, holder.pid, threading.Event()
        self.replaced = stale.obituary() if stale is not None else None
        threading.Thread(target=self._beat, args=(self._ended,), name="run-lock", daemon=True).start()

    def _taken(self, mine: bytes) -> _Found | None:
        """Take the lock, as soon as it is free. Returns the stale one that stood there, None where none did."""
        deadline = time.monotonic() + self._wait
        while True:
            try:
                return _take(self._file, mine, self._stale)
            except _InUse:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Give the folder back. Does nothing where the lock is not ours, or is that of the process we forked from."""
        self._ended.set()
        # A file system that is away is no reason to fail at the end: without its process the lock is stale anyway.
        with contextlib.suppress(OSError):
            if self._pid == os.getpid() and self.is_held():
                self._file.unlink()

    def is_held(self) -> bool:
        """Whether the lock still is ours, as far as it can be read now."""
        return bool(self._mine) and _content(self._file) == self._mine

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(self._heartbeat):
            # A full disk, or a file system that is away, must end neither the signs of life nor the run.
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self._file)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def refuse_if_alive(root: Path, *, stale_seconds: float = STALE_SECONDS) -> None:
    """Raise :class:`UserError` where a living run holds `root`. Takes nothing."""
    with _told(root):
        found = _look(root / FILE_NAME, stale_seconds)
        if found is not None and found.alive:
            raise _InUse(found)


def living(root: Path, *, stale_seconds: float = STALE_SECONDS) -> str | None:
    """The living run that holds `root`, in words; None where there is none, or it cannot be told."""
    with contextlib.suppress(OSError):
        found = _look(root / FILE_NAME, stale_seconds)
        if found is not None and found.alive:
            return found.presence()
    return None


class _Holder(BaseModel):
    """Who holds a lock. What the system does not know is None."""

    model_config = ConfigDict(frozen=True, strict=True)

    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    started: int | None
    token: str
    command: str
    since: str

    @classmethod
    def this_process(cls, command: str) -> _Holder:
        pid = os.getpid()
        return cls(
            host=platform.node(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=pid,
            started=_start_time(pid),
            token=secrets.token_hex(16),
            command=command,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_within_sight(self) -> bool:
        """Whether its process number means the same here as where it was written."""
        there, here = (self.boot_id, self.pid_namespace), (_boot_id(), _pid_namespace())
        return self.host == platform.node() and self.started is not None and None not in there and there == here


@dataclass(frozen=True)
class _Found:
    """A lock as it lies there. `holder` is None where it cannot be read; `age` are seconds since the sign of life."""

    content: bytes
    holder: _Holder | None
    age: float
    alive: bool

    @property
    def whose(self) -> str:
        return f"a run on {self.holder.host} (pid {self.holder.pid})" if self.holder else "a run of unknown origin"

    def presence(self) -> str:
        heard = f"last heard of {self.age:.0f} s ago"
        if self.holder is None:
            return f"{self.whose} ({heard})"
        return f"a run on {self.holder.host} (pid {self.holder.pid}, {heard})"

    def obituary(self) -> str:
        if self.holder is not None and self.holder.is_within_sight():
            return f"{self.whose} ended without giving the folder back"
        return f"{self.whose} was last heard of {self.age:.0f} s ago and counts as ended"


class _InUse(Exception):
    """A living run holds the lock."""

    def __init__(self, found: _Found) -> None:
        super().__init__()
        self.found = found


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    """What goes wrong with the lock of `root`, as one line for people."""
    try:
        yield
    except _InUse as error:
        raise UserError(
            f"output.output_dir: {root} is in use by {error.found.presence()}; "
            "wait for its end, stop it, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"output.output_dir: {root} cannot be locked: {error.strerror or error}; mend that, or name another folder"
        ) from error


def _take(path: Path, mine: bytes, stale_seconds: float) -> _Found | None:
    """Make `path` a lock with the content `mine`. Returns the stale one that stood there, None where none did.

    Raises :class:`_InUse` where a living run holds it or is about to take it over.
    """
    for _ in range(_TRIES):
        if _create(path, mine):
            return None
        found = _look(path, stale_seconds)
        if found is None:
            continue
        if found.alive:
            raise _InUse(found)
        if _succeed(path, found, mine, stale_seconds):
            return found
    raise FileExistsError(0, f"{path.name} changes all the time")


def _succeed(path: Path, stale: _Found, mine: bytes, stale_seconds: float) -> bool:
    """Put `mine` in the place of a stale lock; False where something else stands there by now.

    Of two runs that find the same stale lock, the slower must not replace the lock of the faster. So whoever is to
    replace it first takes a lock that is named for it, and renames just that: if its holder is late and has lost it,
    it has nothing left to rename. If its holder dies, it is stale and replaced in the same way.
    """
    heir = path.with_name(f"{FILE_NAME}.{hashlib.sha256(path.name.encode() + stale.content).hexdigest()[:16]}")
    _take(heir, mine, stale_seconds)
    try:
        now = _look(path, stale_seconds)
        if now is not None and now.content == stale.content and not now.alive:
            with contextlib.suppress(FileNotFoundError):
                os.replace(heir, path)
        return _content(path) == mine
    finally:
        if _content(heir) == mine:
            heir.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Write a file that must not be there yet; False where it is."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _look(path: Path, stale_seconds: float) -> _Found | None:
    """The lock at `path` and whether its holder is alive, None where there is no lock."""
    # Before the time: a network file system asks its server for the time of a file anew when that is opened.
    content = _content(path)
    if content is None:
        return None
    try:
        last = path.lstat().st_mtime
    except FileNotFoundError:
        return None
    age = max(0.0, _clock(path.parent) - last)
    try:
        holder = _Holder.model_validate_json(content)
    except ValidationError:
        holder = None
    if holder is not None and holder.is_within_sight():
        return _Found(content, holder, age, alive=_start_time(holder.pid) == holder.started)
    return _Found(content, holder, age, alive=age < stale_seconds)


def _content(path: Path) -> bytes | None:
    """What a lock says: None where there is none, nothing where it cannot be read."""
    try:
        # A pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return b""
    try:
        return os.read(descriptor, _MOST_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _clock(folder: Path) -> float:
    """The time by the clock that sets modification times in `folder`, which need not be this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        # On a full disk the time of its creation does as well.
        with contextlib.suppress(OSError):
            os.write(file.fileno(), b".")
        return os.fstat(file.fileno()).st_mtime


def _boot_id() -> str | None:
    return _read("/proc/sys/kernel/random/boot_id")


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_time(pid: int) -> int | None:
    """When a living process was started, in the kernel's ticks since the boot; None for one that has ended."""
    # The name of the program comes second, in parentheses, and may hold anything.
    fields = (_read(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in _ENDED else None


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip() or None
    except OSError:
        return None
