"""A run's `metrics.jsonl`: whole lines only, one record a step over all starts, and no end of training over it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_dist.rundir import write_text

# Lines that wait for a disk: hours of training, and a few megabytes.
_MOST_KEPT = 10_000
# What a record has beside the values that were logged.
_WATCHED = ("time", "max_steps")


class Outage:
    """Says once on stderr that something cannot be written, and once that it can again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lasts = False

    def begins(self, error: Exception, meanwhile: str) -> None:
        """`meanwhile`: what becomes of the records."""
        if not self.lasts:
            self._say(f"cannot be written: {getattr(error, 'strerror', None) or error}; {meanwhile}")
        self.lasts = True

    def ends(self) -> None:
        if self.lasts:
            self._say("is written again")
        self.lasts = False

    def _say(self, what: str) -> None:
        # A log that stderr goes to may be on the same disk.
        with contextlib.suppress(OSError):
            print(f"warning: {self.name} {what}", file=sys.stderr, flush=True)


class LogFile(TrainerCallback):  # type: ignore[misc]
    """Every record as a line of JSON in the run's `metrics.jsonl`, whatever trackers there are.

    What cannot be written is kept, the newest 10,000 lines of it, and written with a later record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: deque[str] = deque(maxlen=_MOST_KEPT)
        self._outage = Outage(str(path))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # For those who watch: how long a step takes, when the newest was, and how many there will be.
        watched = {"time": round(time.time(), 3), "max_steps": state.max_steps}
        self._kept.append(json.dumps({"step": state.global_step, **logs, **watched}) + "\n")
        self._write()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A run that goes on from this checkpoint does not do the steps again whose lines wait.
        if self._kept:
            self._write()

    def _write(self) -> None:
        try:
            append(self.path, "".join(self._kept).encode())
        except OSError as error:
            self._outage.begins(error, "its lines are kept in memory and tried again")
        else:
            self._kept.clear()
            self._outage.ends()


def append(path: Path, lines: bytes) -> None:
    """Add whole lines to a file, or leave it as it was. Raises :class:`OSError`."""
    size = _whole(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            written = os.write(descriptor, lines)
        finally:
            # Some file systems say only here that the disk is full.
            os.close(descriptor)
        if written != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _whole(path: Path) -> int:
    """The size of a file, from which a last line without an end (its truncation failed, too) is removed."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return 0
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return size
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
    except FileNotFoundError:
        return 0
    os.truncate(path, size)
    return size


def rewind_metrics(path: Path, step: int) -> int:
    """Drop the records of steps after `step`, which will be done again, and lines that were never finished.

    The file is whole at every moment. Returns the highest step that it held, 0 for none. Raises :class:`OSError`.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    found = [(record["step"], line) for line in text.splitlines() if (record := _record(line)) is not None]
    kept = "".join(f"{line}\n" for number, line in found if number <= step)
    if kept != text:
        write_text(path, kept)
    return max((number for number, _ in found), default=0)


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The step and the values of each record of a `metrics.jsonl`, as they were logged.

    Raises :class:`OSError`, but not for no file.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if (record := _record(line)) is not None:
                yield record.pop("step"), {name: value for name, value in record.items() if name not in _WATCHED}


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
