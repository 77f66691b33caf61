"""What the end of an attempt means: the run is done, starts again here, goes back into the queue, or has ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launch.logtail import cause
from launch.slurm.records import End, Outcome, RankRecord, Start, Submission
from sft_dist.errors import EXIT_BUG, EXIT_DONE, EXIT_RESUMABLE, EXIT_USER

# An allocation with less time left is not worth a start: libraries and data take a part of it.
_WORTH_SECONDS = 300.0
# Slurm sends the signal that comes before the time limit up to a minute early.
_EARLY_SECONDS = 90.0
_KILLED_BY_SLURM = (-signal.SIGKILL, -signal.SIGTERM)
# Of a worker that was told to stop before it could listen.
_BY_SIGNAL = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGUSR1, -signal.SIGINT)

# The reason of an end that the user asked for.
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Facts:
    """What is known at the end of an attempt. `step`: the last one known to be done; `code`: srun's exit code.

    `silent`: nodes of the job that do not answer. `seconds_left`: to the job's time limit; None where not known.
    `message`: what the rank to blame said last. `spare_nodes`: nodes of the partition beyond those the job needs.
    """

    code: int
    step: int
    ranks: Sequence[RankRecord]
    silent: Sequence[str]
    cancelled: bool
    preempted: bool
    seconds_left: float | None
    spare_nodes: int
    message: str = ""


@dataclass(frozen=True)
class Verdict:
    """`exclude`: nodes that the next attempt is not to have."""

    outcome: Outcome
    reason: str
    rank: int | None = None
    node: str | None = None
    exclude: tuple[str, ...] = ()


def decide(facts: Facts, submission: Submission, history: Sequence[Start | End]) -> Verdict:
    """The verdict on the newest attempt, of which `history` has the start and not the end."""
    if facts.code == EXIT_DONE and all(one.code == EXIT_DONE for one in facts.ranks):
        return Verdict("done", "done")
    if facts.cancelled:
        return Verdict("stop", CANCELLED)
    first = to_blame(facts.ranks)
    if first is not None and first.code == EXIT_USER:
        return _of(first, "stop", facts.message or _told(first))
    stopped = first is not None and first.stopped and first.code in (EXIT_RESUMABLE, *_BY_SIGNAL)
    limit = stopped and not facts.preempted and _at_the_limit(facts, submission)
    by_slurm = "time limit" if limit else "preempted" if facts.preempted else "told to stop"
    reason = by_slurm if stopped else _failure(facts, first)
    # A preemption says nothing about the run; a time limit too short for one step would come for ever.
    alike = 0 if stopped and not limit else 1 + _in_a_row(history, facts.step)
    if alike >= submission.same_step:
        what = "the time limit is too short" if limit else reason
        return _of(first, "stop", f"{what}; {alike} attempts in a row ended at step {facts.step}")
    if stopped:
        return _requeued(facts, submission, history, Verdict("requeue", reason))
    return _after_failure(facts, submission, history, first, reason)


def to_blame(ranks: Sequence[RankRecord]) -> RankRecord | None:
    """The rank that failed first: the others die of its death, or are killed for it.

    A death that Slurm brings, to all that are left, comes after one of the rank's own.
    """
    failed = [one for one in ranks if one.code not in (None, EXIT_DONE)]

    def order(one: RankRecord) -> tuple[int, str, int]:
        code = one.code or 0
        own = code not in _KILLED_BY_SLURM or not one.stopped
        # What the user has to mend would come again, whatever else went wrong.
        plain = 0 if code == EXIT_USER else 2 if code == EXIT_RESUMABLE or not own else 1
        return plain, one.ended or "", one.rank

    return min(failed, key=order, default=None)


def _failure(facts: Facts, first: RankRecord | None) -> str:
    if facts.silent:
        return f"no answer from {', '.join(facts.silent)}"
    if first is None:
        gone = sorted(one.rank for one in facts.ranks if one.code is None)
        named = f"rank {gone[0]}" if len(gone) == 1 else f"{len(gone)} ranks" if gone else "the step"
        return f"{named} ended without a word (srun's exit code {facts.code})"
    told = _told(first)
    return f"{told}: {facts.message}" if facts.message else told


def _told(one: RankRecord) -> str:
    return f"rank {one.rank} on {one.node} {cause(one.code or 0)}"


def _of(first: RankRecord | None, outcome: Outcome, reason: str) -> Verdict:
    return Verdict(outcome, reason, first.rank if first else None, first.node if first else None)


def _at_the_limit(facts: Facts, submission: Submission) -> bool:
    return facts.seconds_left is not None and facts.seconds_left < submission.signal_seconds + _EARLY_SECONDS


def _in_a_row(history: Sequence[Start | End], step: int) -> int:
    """How many of the newest attempts failed or ran out of time at this step. What Slurm ended does not count."""
    count = 0
    for one in reversed([one for one in history if isinstance(one, End)]):
        if one.reason in ("told to stop", "preempted"):
            continue
        if one.step != step or one.verdict not in ("again", "requeue"):
            break
        count += 1
    return count


def _after_failure(
    facts: Facts, submission: Submission, history: Sequence[Start | End], first: RankRecord | None, reason: str
) -> Verdict:
    died = first is not None and first.code not in (EXIT_BUG, EXIT_RESUMABLE) and not first.stopped
    node = first.node if first is not None and died else None
    suspects = list(facts.silent) or ([node] if node is not None and node in _failed_before(history) else [])
    enough_time = facts.seconds_left is None or facts.seconds_left > submission.signal_seconds + _WORTH_SECONDS
    if submission.in_place and not suspects and enough_time:
        return _of(first, "again", reason)
    exclude = tuple(suspects[: facts.spare_nodes])
    return _requeued(
        facts, submission, history, Verdict("requeue", reason, first.rank if first else None, node, exclude)
    )


def _failed_before(history: Sequence[Start | End]) -> set[str]:
    """Nodes on which a rank died in the attempts just before, without a step in the queue since."""
    found = set()
    for one in reversed([one for one in history if isinstance(one, End)]):
        if one.verdict != "again":
            break
        found |= {one.node} if one.node is not None else set()
    return found


def _requeued(facts: Facts, submission: Submission, history: Sequence[Start | End], verdict: Verdict) -> Verdict:
    """A verdict to go back into the queue, as often as the profile allows."""
    jobs = {one.job for one in history[-1:]}
    starts = [one for one in history if isinstance(one, Start) and one.job in jobs]
    in_place = sum(1 for one in history if isinstance(one, End) and one.job in jobs and one.verdict == "again")
    requeues = len(starts) - 1 - in_place
    if requeues < submission.requeue_max:
        return verdict
    word = f"it went back into the queue {requeues} times, as often as requeue.max allows"
    return Verdict("stop", f"{verdict.reason}; {word}", verdict.rank, verdict.node)
