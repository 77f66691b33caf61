"""What the batch script runs before the ranks: `python -m launch.slurm.before RUN`, on the job's first node.

It notes the attempt and prints where the ranks meet: `ADDRESS PORT ATTEMPT`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.slurm.commands import expanded, show
from launch.slurm.records import (
    SlurmDir,
    Start,
    Submission,
    append_attempt,
    make_folder,
    now,
    read_attempts,
    read_submission,
    write_submission,
)
from launch.slurm.script import NOTHING_TO_DO
from sft_dist.checkpoints import folder as folders
from sft_dist.errors import EXIT_DONE, EXIT_USER, UserError
from sft_dist.rundir import RunDir

# Below the range that kernels take ports for outgoing connections from.
_FIRST_PORT, _PORTS = 20_000, 12_000
_TRIES = 200


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or that of a run that is done, or 2 with one line on stderr."""
    root = Path(words[0])
    try:
        submission = read_submission(SlurmDir(root))
        if submission is None:
            raise UserError(f"{SlurmDir(root).submission}: cannot be read; submit the run with `sft-dist submit`")
        # What it says goes to the job's log: stdout is for the script.
        if submission.hook and subprocess.run([*submission.hook, "begin"], stdout=sys.stderr, check=False).returncode:
            return EXIT_USER
        if is_done(root, submission):
            print(f"sft-dist: {root} is done", file=sys.stderr)
            return NOTHING_TO_DO
        print(prepare(root, submission, os.environ))
    except UserError as error:
        print(f"sft-dist: {error}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        print(f"sft-dist: {SlurmDir(root).folder}: cannot be written: {error.strerror}; mend that, then "
              f"`sft-dist resume {root}`", file=sys.stderr)  # fmt: skip
        return EXIT_USER
    return EXIT_DONE


def is_done(root: Path, submission: Submission) -> bool:
    """Whether the work has come to its end: of a run the summary is written last."""
    return Path(submission.result).exists() if submission.result else RunDir(root).summary.exists()


def prepare(root: Path, submission: Submission, environment: Mapping[str, str]) -> str:
    """Note the start of an attempt; `ADDRESS PORT ATTEMPT` for the tasks. Raises :class:`UserError`."""
    at, job = SlurmDir(root), job_name(environment)
    nodes = expanded(environment["SLURM_JOB_NODELIST"])
    # Slurm's own count misses the attempts within one allocation.
    restart = sum(1 for one in read_attempts(at) if one.event == "start" and one.job == job)
    step = max(folders.complete(RunDir(root).checkpoints), default=0)
    port = free_port(int(environment["SLURM_JOB_ID"]) * 16 + restart % 16)
    _adopt(at, job, submission)
    make_folder(at.ranks(job, restart))
    append_attempt(at, Start(at=now(), job=job, restart=restart, nodes=nodes, step=step))
    return f"{address(nodes[0])} {port} {restart}"


def job_name(environment: Mapping[str, str]) -> str:
    """The job's number, `ARRAY_INDEX` in an array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def address(node: str) -> str:
    """Where Slurm itself reaches a node: a name server need not know the node by the name that Slurm has for it."""
    try:
        return show("node", node).get("NodeAddr") or node
    except UserError:
        # A controller that is away is no reason to give the nodes back.
        return node


def free_port(number: int) -> int:
    """A port that is free on this machine; jobs of other numbers begin to look elsewhere."""
    for offset in range(_TRIES):
        port = _FIRST_PORT + (number + offset * 997) % _PORTS
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port between {_FIRST_PORT} and {_FIRST_PORT + _PORTS} on {socket.gethostname()}")


def _adopt(at: SlurmDir, job: str, submission: Submission) -> None:
    """Make the run this job's, and give the task to submitit under the name it looks for, for a job of another hand."""
    if submission.job_id != job:
        # Who submits it again takes back that it was cancelled.
        at.cancelled.unlink(missing_ok=True)
        write_submission(at, submission.model_copy(update={"job_id": job}))
    wanted = at.folder / f"{job}_submitted.pkl"
    if not wanted.exists() and at.task.exists():
        unfinished = wanted.with_suffix(".unfinished")
        shutil.copyfile(at.task, unfinished)
        os.replace(unfinished, wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
