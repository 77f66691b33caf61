"""What becomes of a run: what its files and Slurm say, made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.slurm import reasons
from launch.slurm.queue import Answer, Job
from launch.slurm.records import End, SlurmDir, Start, Submission, read_attempts, read_submission, seconds
from sft_dist.errors import EXIT_RESUMABLE
from sft_dist.render.text import reveal
from sft_dist.rundir import RunDir
from sft_dist.runlock import living

Kind = Literal["queued", "running", "done", "failed", "cancelled", "stopped", "gone"]


@dataclass(frozen=True)
class State:
    """`why`: in words, may be empty. `since`: seconds since the epoch, of what runs or waits, None where not known."""

    kind: Kind
    why: str = ""
    nodes: str | None = None
    since: float | None = None


@dataclass(frozen=True)
class Held:
    """What the files of a run tell of its state. `attempts`: those of the newest job; `history`: of all."""

    root: Path
    submission: Submission | None
    history: tuple[Start | End, ...]
    attempts: tuple[Start | End, ...]
    is_cancelled: bool
    is_done: bool
    alive: str | None

    @property
    def job_id(self) -> str | None:
        return self.submission.job_id if self.submission is not None else None


def read(root: Path) -> Held:
    """Look at a run's files. Raises nothing: what cannot be read is not there."""
    at = SlurmDir(root)
    submission = read_submission(at)
    history = tuple(read_attempts(at))
    job = submission.job_id if submission is not None else None
    attempts = tuple(each for each in history if each.job == job)
    submitted = _seconds(submission.submitted) if submission is not None else None
    cancelled = _modified(at.cancelled)
    return Held(
        root=root,
        submission=submission,
        history=history,
        attempts=attempts,
        is_cancelled=cancelled is not None and cancelled >= (submitted or 0.0) - 1,
        is_done=_is_done(root),
        alive=living(root),
    )


def state_of(held: Held, answer: Answer) -> State:
    """The state. `answer`: what Slurm says of the run's job."""
    if held.submission is None:
        return _local(held)
    job = answer.job
    if job is not None and not job.has_ended:
        return _in_slurm(held, job)
    last = held.attempts[-1] if held.attempts else None
    if isinstance(last, End):
        return _after(held, last, answer)
    if answer.is_down and not held.is_cancelled:
        if last is None:
            return State("queued", "as its files have it", since=_seconds(held.submission.submitted))
        return State("running", "as its files have it", ", ".join(last.nodes), _seconds(last.at))
    return _without_a_word(held, job, has_begun=last is not None)


def restarts(history: Sequence[Start | End]) -> list[tuple[str, int | None, str]]:
    """Every attempt that was not the last: when it ended, at which step, and why."""
    found: list[tuple[str, int | None, str]] = []
    for number, record in enumerate(history):
        following = history[number + 1 :]
        if isinstance(record, End) and any(isinstance(each, Start) for each in following):
            found.append((record.at, record.step, record.reason))
        elif isinstance(record, Start) and following and isinstance(following[0], Start):
            again = following[0]
            found.append((again.at, again.step, "killed without a word (preempted, a lost node, or requeued by hand)"))
    return found


def _local(held: Held) -> State:
    if held.alive is not None:
        return State("running", held.alive)
    if held.is_done:
        return State("done")
    has_begun = RunDir(held.root).metrics.exists() or RunDir(held.root).recipe.exists()
    return State("stopped", "" if has_begun else "it has not begun")


def _in_slurm(held: Held, job: Job) -> State:
    if not job.waits:
        if held.is_cancelled:
            return State("running", "it is being cancelled", job.nodes, _seconds(job.start) if job.start else None)
        words = {"COMPLETING": "it is ending", "CONFIGURING": "its nodes are being made ready"}.get(job.state, "")
        return State("running", words, job.nodes, _seconds(job.start) if job.start else None)
    if job.state == "SUSPENDED":
        return State("queued", "it is suspended", job.nodes)
    begun = [each for each in held.attempts if isinstance(each, Start)]
    since = _seconds(held.attempts[-1].at) if begun else _seconds(job.submitted)
    # Slurm lets a job that was put back rest for a while.
    rests = job.reason == "BeginTime" and (begun or job.restarts)
    why = "it was put back, and begins again after a rest (BeginTime)" if rests else reasons.waits(job.reason)
    return State("queued", why, since=since)


def _after(held: Held, last: End, answer: Answer) -> State:
    at = _seconds(last.at)
    reason = reveal(last.reason)
    if last.verdict == "done":
        return State("done", since=at)
    if held.is_cancelled:
        return State("cancelled", since=at)
    if last.verdict == "stop":
        return State("stopped" if last.code == EXIT_RESUMABLE else "failed", reason, since=at)
    if answer.is_down:
        return State("queued", f"as its files have it, after: {reason}", since=at)
    if answer.job is not None and answer.job.state == "CANCELLED":
        return State("cancelled", f"{reason}, and its job was cancelled", since=at)
    return State("stopped", f"{reason}; it was to begin again, but its job is gone", since=at)


def _without_a_word(held: Held, job: Job | None, *, has_begun: bool) -> State:
    """The job is over, and the run has not said how it ended."""
    at = _seconds(job.end) if job is not None and job.end else None
    if held.is_done:
        return State("done", since=at)
    if held.is_cancelled or (job is not None and job.state == "CANCELLED"):
        return State("cancelled", "" if held.is_cancelled else "by scancel or an administrator", since=at)
    if job is None:
        known = "its job has left no word of its end" if has_begun else "Slurm knows nothing of its job"
        return State("gone", f"{known}, and Slurm has forgotten it" if has_begun else known)
    words = f"its job {reasons.ended(job.state)}" + ("" if has_begun else " before the run began")
    return State("failed", words, since=at)


def _is_done(root: Path) -> bool:
    """Whether the summary, which comes last, is of the training that the metrics are of."""
    summary, metrics = _modified(RunDir(root).summary), _modified(RunDir(root).metrics)
    return summary is not None and summary >= (metrics or 0.0)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _seconds(at: str | None) -> float | None:
    try:
        return seconds(at) if at else None
    except ValueError:
        return None
