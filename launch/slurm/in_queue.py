"""What of a user's runs is in Slurm's queue: waiting, or running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.commands import ask
from launch.slurm.records import SlurmDir, read_submission

_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class Queued:
    """A job. `job` is `ARRAY_INDEX` in an array, `state` is Slurm's in small letters, `reason` why it waits."""

    job: str
    state: str
    reason: str
    comment: str

    @property
    def waits(self) -> bool:
        """Whether it does not run."""
        return self.state.upper() in _WAITS


def look() -> dict[str, Queued]:
    """The jobs of this user by their ids, each of an array alone. Raises :class:`UserError` without an answer."""
    found = {}
    for line in ask(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%k"]).splitlines():
        job, state, reason, comment = [*line.split("|", 3), "", "", ""][:4]
        found[job] = Queued(job, state.lower(), reason, comment)
    return found


def of_run(root: Path, jobs: Mapping[str, Queued]) -> Queued | None:
    """The job of a run, None where none is in the queue: by its number, or, if submitted by hand, by its comment."""
    held = read_submission(SlurmDir(root))
    if held is not None and held.job_id is not None and held.job_id in jobs:
        return jobs[held.job_id]
    wanted = str(root.absolute())
    return next((one for one in jobs.values() if one.comment == wanted), None)
