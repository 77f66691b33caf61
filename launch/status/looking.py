"""Everything that is known of one run, gathered."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.logs.failure import Failure, first_failure
from launch.slurm import queue
from launch.slurm.commands import SlurmDown
from launch.slurm.queue import Answer
from launch.slurm.records import End, Start, seconds
from launch.status import state as states
from launch.status.progress import Progress, newest_checkpoint, progress
from launch.status.state import Held, State


@dataclass(frozen=True)
class Status:
    """A run as it is `now` (seconds since the epoch). `trouble`: why Slurm could not be asked."""

    now: float
    held: Held
    state: State
    progress: Progress
    answer: Answer
    expected: str | None = None
    checkpoint: tuple[int, float] | None = None
    failure: Failure | None = None

    @property
    def root(self) -> Path:
        return self.held.root

    @property
    def requeues(self) -> int:
        """How often the newest job has gone back into the queue."""
        told = self.answer.job.restarts if self.answer.job is not None else None
        attempts = self.held.attempts
        begun = [each.restart for each in attempts if isinstance(each, Start)]
        # Attempts on the same nodes do not go by the queue.
        in_place = sum(1 for each in attempts if isinstance(each, End) and each.verdict == "again")
        return max([told or 0, *(restart - in_place for restart in begun)])

    @property
    def ends(self) -> float | None:
        """When the training will be done, if it runs on."""
        left = self.progress.seconds_left
        return self.now + left if self.state.kind == "running" and left is not None else None


def look(root: Path) -> Status:
    """Look at one run closely, and ask Slurm about its job."""
    held = states.read(root)
    answer = _ask(held)
    job = answer.job
    status = glance(held, answer)
    if job is None and held.job_id is not None and status.state.kind == "gone":
        # Where there is accounting, it remembers.
        known = queue.last_state(held.job_id)
        if known is not None:
            answer = Answer(_remembered(held.job_id, known))
            status = glance(held, answer)
    expected = queue.expected_start(job.id) if job is not None and job.waits else None
    went_wrong = status.state.kind in ("failed", "stopped", "cancelled", "gone")
    return replace(
        status,
        expected=expected,
        checkpoint=newest_checkpoint(root),
        failure=first_failure(root) if went_wrong else None,
    )


def glance(held: Held, answer: Answer) -> Status:
    """What a line of a table needs."""
    starts = [at for each in held.history if isinstance(each, Start) and (at := _at(each.at)) is not None]
    return Status(
        now=time.time(),
        held=held,
        state=states.state_of(held, answer),
        progress=progress(held.root, starts),
        answer=answer,
    )


def to_json(status: Status) -> dict[str, Any]:
    """The status as plain values: times in seconds since the epoch, those of Slurm as ISO 8601."""
    held = status.held
    job = asdict(status.answer.job) if status.answer.job is not None else None
    return {
        "run": str(held.root.absolute()),
        "state": asdict(status.state),
        "progress": asdict(status.progress) | {"seconds_left": status.progress.seconds_left},
        "ends": status.ends,
        "requeues": status.requeues,
        "submission": held.submission.model_dump() if held.submission is not None else None,
        "job": job | {"run": str(job["run"]) if job["run"] else None} if job is not None else None,
        "expected_start": status.expected,
        "checkpoint": None
        if status.checkpoint is None
        else dict(zip(("step", "time"), status.checkpoint, strict=True)),
        "restarts": [dict(zip(("at", "step", "reason"), each, strict=True)) for each in states.restarts(held.history)],
        "first_error": asdict(status.failure) if status.failure is not None else None,
        "slurm": status.answer.trouble,
    }


def _ask(held: Held) -> Answer:
    if held.submission is None:
        return Answer()
    if held.job_id is not None:
        return queue.answer(held.job_id)
    # It was being submitted: Slurm may have it all the same.
    try:
        return Answer(next((each for each in queue.mine() if each.run == held.root.absolute()), None))
    except SlurmDown as error:
        return Answer(trouble=str(error))


def _remembered(job_id: str, state: str) -> queue.Job:
    return queue.Job(job_id, state, None, None, None, None, None, None, None, None)


def _at(text: str) -> float | None:
    try:
        return seconds(text)
    except ValueError:
        return None
