"""Which logs a run has, and when it is over."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from launch.logs.reading import Unit
from launch.slurm.records import End, SlurmDir, Start, read_attempts, seconds
from sft_dist.errors import UserError
from sft_dist.render.text import reveal
from sft_dist.rundir import RunDir

# What is no rank's: the output of the batch job, and the beginnings and ends of attempts.
JOB, RUN = -1, -2
# After it a job that was to end and has not said how it did will say nothing more.
_LAST_WORD_SECONDS = 180.0
_RANK = re.compile(r"rank(\d+)\.log")


def run_folder(name: str) -> Path:
    """A run's folder. Raises :class:`UserError` for what is none."""
    path = Path(name).expanduser()
    inside = ("recipe.yaml", "logs", "slurm", "metrics.jsonl")
    if not path.is_dir() or not any((path / part).exists() for part in inside):
        what = "holds no recipe.yaml, logs or slurm" if path.is_dir() else "is no folder"
        raise UserError(f"RUN: {reveal(str(path))} {what}; name a run's folder (its output.output_dir)")
    return path


def rank_logs(root: Path) -> dict[int, Path]:
    """The logs of the ranks, by rank."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in RunDir(root).logs.iterdir():
            if (named := _RANK.fullmatch(path.name)) is not None:
                found[int(named[1])] = path
    return dict(sorted(found.items()))


def job_logs(root: Path) -> list[Path]:
    """What batch jobs have printed, the oldest first."""
    folder = SlurmDir(root).folder
    found = {path for pattern in ("*.out", "*.err") for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def events(records: list[Start | End]) -> Iterator[Unit]:
    """The beginnings and ends of attempts as lines of a log."""
    for record in records:
        with contextlib.suppress(ValueError):
            at = seconds(record.at)
            yield Unit(RUN, at, at, [_event(record)])


def _event(record: Start | End) -> str:
    attempt = f"attempt {record.restart + 1} of job {reveal(record.job)}"
    if isinstance(record, Start):
        begins = f" from step {record.step}" if record.step > 0 else ""
        return f"{attempt} begins on {reveal(', '.join(record.nodes))}{begins}"
    then = {"done": "done", "again": "starts again in place", "requeue": "back into the queue", "stop": "stopped"}
    reason = f"{reveal(record.reason)}; " if record.reason != record.verdict else ""
    return f"{attempt} has ended at step {record.step}: {reason}{then[record.verdict]}"


def attempt_begin(record: Start | End) -> float:
    """When it began, in seconds since the epoch; 0 where that cannot be read."""
    try:
        return seconds(record.at)
    except ValueError:
        return 0.0


def over(root: Path) -> bool:
    """Whether nothing more is to be expected of a run, as far as its files tell."""
    from sft_dist.runlock import living

    at = SlurmDir(root)
    if not at.submission.exists():
        return living(root) is None
    records = read_attempts(at)
    newest = records[-1] if records else None
    submitted = _modified(at.submission)
    if isinstance(newest, End) and newest.verdict in ("done", "stop") and attempt_begin(newest) >= submitted:
        return True
    cancelled = _modified(at.cancelled)
    if cancelled > submitted:
        # A run that is cancelled saves before it ends.
        runs = isinstance(newest, Start) and time.time() - cancelled < _LAST_WORD_SECONDS
        return not runs
    # The job has a word to say after the run's own end; one that was killed before it is not waited for.
    summary = _modified(RunDir(root).summary)
    begun = attempt_begin(newest) if newest is not None else 0.0
    return summary > max(begun, submitted) and time.time() - summary > _LAST_WORD_SECONDS


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def clock(at: float) -> datetime:
    """A time as this machine's user reads it."""
    return datetime.fromtimestamp(at).astimezone()
