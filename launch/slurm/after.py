"""What the batch script runs after the ranks: `python -m launch.slurm.after RUN CODE RENDEZVOUS`.

It alone decides what the end of the step means, notes it, and puts the job back into the queue where that is due.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from launch import logtail
from launch.line_files import end_of
from launch.slurm.before import job_name
from launch.slurm.commands import SlurmDown, SlurmRefused, ask, expanded, fields, show
from launch.slurm.records import (
    End,
    SlurmDir,
    Start,
    Submission,
    append_attempt,
    now,
    read_attempts,
    read_ranks,
    read_submission,
)
from launch.slurm.script import AGAIN, FAILED
from launch.slurm.verdict import Facts, Verdict, decide, to_blame
from sft_dist.checkpoints import folder as folders
from sft_dist.errors import EXIT_DONE, UserError
from sft_dist.rundir import RunDir

# A controller that is restarted is away for a while.
_TRIES, _PAUSE_SECONDS = 10, 6.0
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TAIL_BYTES = 1 << 16
_CODES = {"again": AGAIN, "requeue": EXIT_DONE, "stop": EXIT_DONE, "done": EXIT_DONE}


def main(words: list[str]) -> int:
    """Returns 4 where the script is to run once more, 5 where it failed though all ranks ended well, else 0."""
    # Slurm signals every process of a job that it takes down, and this one has to come to its end, as have the
    # commands that it asks, which inherit this.
    for number in _HEARD:
        signal.signal(number, signal.SIG_IGN)
    root, code, restart = Path(words[0]), int(words[1]), int(words[2].split()[2])
    at, job = SlurmDir(root), job_name(os.environ)
    submission = read_submission(at)
    if submission is None:
        logtail.say([f"sft-dist: {at.submission}: cannot be read; go on with `sft-dist resume {root}`"])
        return EXIT_DONE
    history = read_attempts(at)
    start = next(one for one in reversed(history) if isinstance(one, Start))
    facts = gather(root, at, job, restart, code, start, submission, os.environ)
    verdict = decide(facts, submission, history)
    if verdict.outcome == "done" and submission.hook:
        verdict = _finish(submission, verdict)
    _note(at, job, restart, facts, verdict)
    if verdict.outcome == "requeue":
        _requeue(at, job, restart, facts, verdict)
    return FAILED if verdict.outcome == "stop" and code == EXIT_DONE else _CODES[verdict.outcome]


def _finish(submission: Submission, verdict: Verdict) -> Verdict:
    """What is still to be done on one node, such as merging an adapter, before the job counts as done."""
    code = subprocess.run([*submission.hook, "end"], check=False).returncode
    return verdict if code == EXIT_DONE else Verdict("stop", f"what follows the training ended with exit code {code}")


def gather(
    root: Path, at: SlurmDir, job: str, restart: int, code: int, start: Start, submission: Submission,
    environment: Mapping[str, str],
) -> Facts:  # fmt: skip
    """What can be known now. Slurm that does not answer leaves its part unknown."""
    ranks = read_ranks(at, job, restart)
    first = to_blame(ranks)
    known = _ask_quietly("job", environment["SLURM_JOB_ID"])
    answered = {one.node for one in ranks}
    silent = [node for node in start.nodes if node not in answered] if answered else []
    silent += [node for node in _lost(start.nodes) if node not in silent]
    partition = _ask_quietly("partition", known.get("Partition", ""))
    total = partition.get("TotalNodes", "")
    spare = int(total) - submission.nodes - _excluded(known) if total.isdigit() else 0
    message = ""
    if first is not None:
        log = RunDir(root).logs / f"rank{first.rank}.log"
        said = " ".join(logtail.message(log, 0)[-1:]).removeprefix("sft-dist: ")
        # How the rank died is known, and in more words.
        message = "" if said.startswith(f"rank {first.rank} ") else said
    return Facts(
        code=code,
        step=reached(RunDir(root)),
        ranks=ranks,
        silent=silent,
        cancelled=at.cancelled.exists() or known.get("JobState") == "CANCELLED",
        preempted=known.get("PreemptTime", "None") != "None",
        seconds_left=_seconds_left(known),
        spare_nodes=max(0, spare),
        message=message,
    )


def reached(run: RunDir) -> int:
    """The last step that is known to be done: of the newest checkpoint, or logged."""
    logged = 0
    for line in end_of(run.metrics, _TAIL_BYTES).splitlines():
        with suppress(ValueError, AttributeError, TypeError):
            logged = max(logged, int(json.loads(line).get("step", 0)))
    return max(logged, max(folders.complete(run.checkpoints), default=0))


def _ask_quietly(kind: str, name: str) -> dict[str, str]:
    if not name:
        return {}
    with suppress(UserError):
        return show(kind, name)
    return {}


def _lost(nodes: Sequence[str]) -> list[str]:
    """The nodes that Slurm has lost: a star in a state stands for one that does not answer."""
    try:
        lines = ask(["scontrol", "--oneliner", "show", "node", ",".join(nodes)]).splitlines()
    except UserError:
        return []
    known = [fields(line) for line in lines if line.strip()]
    bad = ("*", "DOWN", "FAIL", "NOT_RESPONDING")
    return [node["NodeName"] for node in known if any(word in node.get("State", "") for word in bad)]


def _excluded(job: Mapping[str, str]) -> int:
    """How many nodes a job is not to have already: with too many it would wait for ever."""
    held = job.get("ExcNodeList", "(null)")
    if held == "(null)":
        return 0
    try:
        return len(expanded(held))
    except UserError:
        return 1 + held.count(",")


def _seconds_left(job: Mapping[str, str]) -> float | None:
    with suppress(KeyError, ValueError):
        return datetime.fromisoformat(job["EndTime"]).timestamp() - time.time()
    return None


def _note(at: SlurmDir, job: str, restart: int, facts: Facts, verdict: Verdict) -> None:
    what = {
        "done": "done",
        "again": "starting again on the same nodes",
        "requeue": "back into the queue",
        "stop": "not started again",
    }[verdict.outcome]
    logtail.say([f"sft-dist: job {job}, step {facts.step}: {verdict.reason}: {what}"])
    with suppress(OSError):
        append_attempt(at, End(at=now(), job=job, restart=restart, code=facts.code, step=facts.step,
                               verdict=verdict.outcome, reason=verdict.reason, rank=verdict.rank, node=verdict.node,
                               exclude=list(verdict.exclude)))  # fmt: skip


def _requeue(at: SlurmDir, job: str, restart: int, facts: Facts, verdict: Verdict) -> None:
    """Put the job back into the queue. Slurm then ends this process, but not before it has named the bad nodes."""
    refused = _patiently(["scontrol", "requeue", job])
    if refused:
        reason = f"{verdict.reason}; Slurm does not put it back into the queue: {refused}"
        _note(at, job, restart, facts, Verdict("stop", reason, verdict.rank, verdict.node))
    elif verdict.exclude:
        held = _ask_quietly("job", job).get("ExcNodeList", "(null)")
        nodes = [*([] if held == "(null)" else [held]), *verdict.exclude]
        _patiently(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"])


def _patiently(words: Sequence[str]) -> str | None:
    """Ask again while Slurm is away; what it refuses, in its words."""
    for tries in range(_TRIES):
        try:
            ask(words)
            return None
        except SlurmRefused as error:
            return error.said
        except SlurmDown as error:
            if tries == _TRIES - 1:
                return str(error)
            time.sleep(_PAUSE_SECONDS)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
