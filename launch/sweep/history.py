"""What a sweep has done so far: `trials.jsonl` in its folder, a line for the start and for the end of each trial.

It tells a trial that failed from one that was stopped. Which trials are done is told by their own folders.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

NAME = "trials.jsonl"


@dataclass(frozen=True)
class Record:
    """`code`, `seconds`, `reason` and `said` are those of an end; `failed`: not to be tried again unasked."""

    event: Literal["start", "end"]
    trial: str
    at: str
    code: int | None = None
    failed: bool = False
    seconds: float | None = None
    reason: str | None = None
    said: str | None = None


def note(root: Path, event: Literal["start", "end"], trial: str, **more: Any) -> None:
    """Add a line; what a killed sweep left unfinished becomes a line of its own. Raises :class:`OSError`."""
    record = Record(event, trial, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), **more)
    line = json.dumps({name: value for name, value in asdict(record).items() if value is not None}) + "\n"
    descriptor = os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(root: Path) -> dict[str, list[Record]]:
    """By the name of the trial's folder, in their order; lines that cannot be read are passed over."""
    try:
        lines = (root / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, list[Record]] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            record = Record(**json.loads(line))
            found.setdefault(record.trial, []).append(record)
    return found
