"""What is kept of a run on Slurm, in RUN/slurm: files that are complete or absent, their owner's alone."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.line_files import add_line
from sft_dist.rundir import write_text

Kind = TypeVar("Kind", bound=BaseModel)
Outcome = Literal["done", "again", "requeue", "stop"]


@dataclass(frozen=True)
class SlurmDir:
    """Names of the things in RUN/slurm. `root` is the run's folder."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "slurm"

    @property
    def submission(self) -> Path:
        return self.folder / "submission.json"

    @property
    def script(self) -> Path:
        return self.folder / "job.sh"

    @property
    def profile(self) -> Path:
        return self.folder / "cluster.yaml"

    @property
    def lock(self) -> Path:
        """Versions of every package that the job imports."""
        return self.folder / "environment.lock"

    @property
    def task(self) -> Path:
        """The task as submitit pickles it, for a job that is submitted by hand."""
        return self.folder / "task.pkl"

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts.jsonl"

    @property
    def cancelled(self) -> Path:
        return self.folder / "cancelled"

    def ranks(self, job: str, restart: int) -> Path:
        """Where the ranks of one attempt leave their records."""
        return self.folder / "ranks" / f"{job}.{restart}"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Submission(_Record):
    """What was asked of Slurm. `job_id` is `ARRAY_INDEX` for a job of an array, None before it is known.

    `threads` are those of each process (OMP_NUM_THREADS); `signal_seconds` come before the time limit. `module`: words
    behind `python -m` of a job that does not train; `result`: the file whose existence means that it is done. `hook`:
    a command that is run with the word `begin` before the ranks and with `end` after a step that ended well. `folder`:
    what the recipe's relative paths are relative to.
    """

    job_id: str | None
    name: str
    cluster: str
    nodes: int
    tasks_per_node: int
    strategy: str
    threads: int = 1
    submitted: str
    partition: str | None = None
    time_minutes: float | None = None
    requeue_max: int = 0
    same_step: int = 3
    in_place: bool = True
    signal_seconds: int = 120
    module: list[str] = []
    result: str | None = None
    hook: list[str] = []
    folder: str | None = None


class Start(_Record):
    """The beginning of an attempt. `restart` counts a job's attempts, `step` is that of the newest checkpoint."""

    event: Literal["start"] = "start"
    at: str
    job: str
    restart: int
    nodes: list[str]
    step: int


class End(_Record):
    """The end of an attempt. `code`: the step's exit code; `step`: the last one known to be done."""

    event: Literal["end"] = "end"
    at: str
    job: str
    restart: int
    code: int
    step: int
    verdict: Outcome
    reason: str
    rank: int | None = None
    node: str | None = None
    exclude: list[str] = []


class RankRecord(_Record):
    """One task of an attempt. `code` is as in subprocess: negative for a death by signal; None while it runs."""

    rank: int
    node: str
    started: str
    ended: str | None = None
    code: int | None = None
    stopped: bool = False


def now() -> str:
    """The time as records have it: ISO 8601, UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds(at: str) -> float:
    """A record's time in seconds since the epoch."""
    return datetime.fromisoformat(at).timestamp()


def make_folder(path: Path) -> None:
    """A folder for its owner alone. Raises :class:`OSError`."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_submission(at: SlurmDir, submission: Submission) -> None:
    make_folder(at.folder)
    write_text(at.submission, submission.model_dump_json(indent=2) + "\n")


def read_submission(at: SlurmDir) -> Submission | None:
    """None where there is none, or it cannot be read."""
    return _read(at.submission, Submission)


def write_rank(at: SlurmDir, job: str, restart: int, record: RankRecord) -> None:
    folder = at.ranks(job, restart)
    make_folder(folder)
    write_text(folder / f"rank-{record.rank:05d}.json", record.model_dump_json() + "\n")


def read_ranks(at: SlurmDir, job: str, restart: int) -> list[RankRecord]:
    """In the order of the ranks."""
    found = (_read(path, RankRecord) for path in sorted(at.ranks(job, restart).glob("rank-*.json")))
    return [record for record in found if record is not None]


def append_attempt(at: SlurmDir, record: Start | End) -> None:
    """Add a line. Raises :class:`OSError`."""
    make_folder(at.folder)
    add_line(at.attempts, record.model_dump_json())


def read_attempts(at: SlurmDir) -> list[Start | End]:
    """All that can be read, in their order."""
    try:
        lines = at.attempts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[Start | End] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            kind = json.loads(line).get("event")
            found.append((Start if kind == "start" else End).model_validate_json(line))
    return found


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
