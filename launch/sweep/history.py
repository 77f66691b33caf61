"""What a sweep has done so far: `trials.jsonl` in its folder, a line for the start and for the end of each trial.

It tells a trial that failed from one that was stopped. Which trials are done is told by their own folders.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launch.line_files import add_line

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
    """Add a line. Raises :class:`OSError`."""
    record = Record(event, trial, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), **more)
    add_line(root / NAME, json.dumps({name: value for name, value in asdict(record).items() if value is not None}))


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
