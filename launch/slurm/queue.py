"""What Slurm knows of jobs: one of them, or all of this user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch.slurm.commands import SlurmDown, SlurmRefused, ask, show
from sft_dist.render.text import reveal

_ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL",
     "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL")
)  # fmt: skip
_SECONDS = 10.0
# Job, state, reason, (expected) start, end, submission, nodes, partition, requeues; the comment may hold anything.
_FORMAT = "%i|%T|%r|%S|%e|%V|%N|%P|%k"


@dataclass(frozen=True)
class Job:
    """A job as Slurm has it. Times are ISO 8601 with a zone, None where there is none; `nodes` as Slurm writes them.

    `start` of a job that waits is when Slurm expects it to begin. `run` is its comment: the run's folder.
    """

    id: str
    state: str
    reason: str | None
    partition: str | None
    nodes: str | None
    start: str | None
    end: str | None
    submitted: str | None
    restarts: int | None
    run: Path | None

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT",
                              "RESV_DEL_HOLD")  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """`job`: None where Slurm does not know it. `trouble`: one line where Slurm is not there or does not answer."""

    job: Job | None = None
    trouble: str | None = None

    @property
    def is_down(self) -> bool:
        return self.trouble is not None


def answer(job_id: str) -> Answer:
    """What Slurm knows of a job, of one that has ended, too, for some minutes. Raises nothing."""
    try:
        return Answer(job(job_id))
    except SlurmDown as error:
        return Answer(trouble=str(error))


def job(job_id: str) -> Job | None:
    """None where Slurm does not know it. Raises :class:`SlurmDown`."""
    try:
        held = show("job", job_id, _SECONDS)
    except SlurmRefused as refused:
        if "Invalid job id" in refused.said:
            return None
        raise SlurmDown(str(refused)) from refused
    return _of_fields(job_id, held) if held.get("JobState") else None


def mine() -> list[Job]:
    """All jobs of this user in the queue. Raises :class:`SlurmDown`."""
    try:
        said = ask(["squeue", "--me", "--noheader", "--array", f"--format={_FORMAT}"], _SECONDS)
    except SlurmRefused as refused:
        raise SlurmDown(str(refused)) from refused
    found = (_of_line(line) for line in said.splitlines())
    return [each for each in found if each is not None]


def expected_start(job_id: str) -> str | None:
    """When Slurm thinks that a waiting job will begin, ISO 8601; None where it does not know, or does not answer."""
    try:
        said = ask(["squeue", "--start", "--noheader", f"--jobs={job_id}", "--format=%S"], _SECONDS).split()
    except (SlurmDown, SlurmRefused):
        return None
    return _time(said[0]) if said else None


def last_state(job_id: str) -> str | None:
    """How a job that has left the queue ended, by accounting; None where there is none."""
    try:
        said = ask(["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=State"], 5.0)
    except (SlurmDown, SlurmRefused):
        return None
    states = [line.split()[0].rstrip("+") for line in said.splitlines() if line.strip()]
    return states[-1] if states else None


def _of_fields(job_id: str, held: Mapping[str, str]) -> Job:
    restarts = held.get("Restarts", "")
    return Job(
        id=job_id,
        state=held["JobState"],
        reason=_word(held.get("Reason")),
        partition=_word(held.get("Partition")),
        nodes=_word(held.get("NodeList")),
        start=_time(held.get("StartTime")),
        end=_time(held.get("EndTime")),
        submitted=_time(held.get("SubmitTime")),
        restarts=int(restarts) if restarts.isdecimal() else None,
        run=_run(held.get("Comment")),
    )


def _of_line(line: str) -> Job | None:
    parts = line.split("|", 8)
    if len(parts) != 9:
        return None
    number, state, reason, start, end, submitted, nodes, partition, comment = parts
    return Job(
        id=number,
        state=state,
        reason=_word(reason),
        partition=_word(partition),
        nodes=_word(nodes),
        start=_time(start),
        end=_time(end),
        submitted=_time(submitted),
        restarts=None,
        run=_run(comment),
    )


def _word(text: str | None) -> str | None:
    return None if not text or text in ("(null)", "None", "N/A", "n/a") else reveal(text.strip())


def _time(text: str | None) -> str | None:
    """Slurm's times are those of this machine's clock."""
    try:
        return datetime.fromisoformat((text or "").strip()).astimezone().isoformat()
    except ValueError:
        return None


def _run(comment: str | None) -> Path | None:
    return Path(comment) if comment is not None and comment.startswith("/") else None
