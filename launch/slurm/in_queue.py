"""Which of a user's jobs in Slurm's queue is that of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launch.slurm.queue import Job, mine
from launch.slurm.records import SlurmDir, read_submission


def look() -> dict[str, Job]:
    """The jobs of this user by their ids, each of an array alone. Raises :class:`UserError` without an answer."""
    return {job.id: job for job in mine() if not job.has_ended}


def of_run(root: Path, jobs: Mapping[str, Job]) -> Job | None:
    """The job of a run, None where none is in the queue: by its number, or, if submitted by hand, by its comment.

    The comment of an array names what its runs are of.
    """
    held = read_submission(SlurmDir(root))
    if held is not None and held.job_id is not None and held.job_id in jobs:
        return jobs[held.job_id]
    # The same folder has several names, through links.
    wanted = os.path.realpath(root)
    return next((job for job in jobs.values() if job.run is not None and os.path.realpath(job.run) == wanted), None)
