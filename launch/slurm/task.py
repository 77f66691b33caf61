"""What each task of a job runs: one worker, in the environment that `accelerate launch` would have given it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.environment import worker_environments
from launch.local import base_environment
from launch.processes import Rank, run_to_end
from launch.slurm.before import job_name
from launch.slurm.records import RankRecord, SlurmDir, Submission, now, read_submission, write_rank
from launch.slurm.script import RENDEZVOUS
from sft_dist.errors import EXIT_RESUMABLE, EXIT_USER, UserError
from sft_dist.recipe import load_recipe
from sft_dist.rundir import RunDir
from sft_dist.runlock import STALE_SECONDS, RunLock

_MARGIN_SECONDS = 10.0
# For the lock of an attempt on a node that Slurm has lost sight of: it ends with its peers, or goes stale.
_LOCK_SECONDS = 3 * STALE_SECONDS
_STAMP = Path(__file__).resolve().parent.parent / "logstamp.py"
# Of the launcher's own, which a worker started by hand would not have.
_OWN = ("SUBMITIT_", "SFT_DIST_RENDEZVOUS")


class Task:
    """The work of one task, as submitit pickles it; everything else is read from the run's folder when it starts."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def __call__(self) -> None:
        """Run one worker to its end. Raises :class:`SystemExit` with its exit code, unless that is 0."""
        # What it says of every signal and every end stands in the records.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        try:
            code = run(Path(self.root), Place.from_environment(os.environ))
        except UserError as error:
            print(f"sft-dist: {error}", file=sys.stderr, flush=True)
            code = EXIT_USER
        if code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """submitit's protocol, for a signal that comes while no worker runs: the same task once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Task(Path(self.root)))


@dataclass(frozen=True)
class Place:
    """Where a task stands in its job, by Slurm's variables, and where the ranks meet."""

    job: str
    restart: int
    address: str
    port: int
    rank: int
    local_rank: int
    node: int
    nodes: int
    tasks: int
    name: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place:
        """Raises :class:`UserError` where ranks are not counted node by node."""
        address, port, restart = environment[RENDEZVOUS].split()
        total, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_NNODES"])
        rank, local, node = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
        tasks = total // nodes
        if rank != node * tasks + local:
            raise UserError(
                f"task {rank} is number {local} on node {node}: {total} tasks are not dealt out evenly over {nodes} "
                "nodes; leave out --distribution and --ntasks in the profile's `sbatch` and `srun`"
            )
        return cls(job_name(environment), int(restart), address, int(port), rank, local, node, nodes, tasks,
                   environment.get("SLURMD_NODENAME", f"node {node}"))  # fmt: skip


def run(root: Path, place: Place) -> int:
    """Run the worker of this task; returns its exit code, 128 + number for a death by signal."""
    at, run_dir = SlurmDir(root), RunDir(root)
    log_to(run_dir.logs / f"rank{place.rank}.log")
    record = RankRecord(rank=place.rank, node=place.name, started=now())
    write_rank(at, place.job, place.restart, record)
    # What another start of the run holds is free later; what else is wrong would be so again.
    fault = EXIT_USER
    try:
        recipe, submission = load_recipe(run_dir.recipe), read_submission(at)
        if submission is None:
            raise UserError(f"{at.submission}: cannot be read; submit the run again with `sft-dist resume`")
        rank = Rank(place.rank, command(run_dir, submission), environment(submission, place, os.environ))
        with ExitStack() as ending:
            if place.rank == 0:
                fault = EXIT_RESUMABLE
                ending.enter_context(RunLock(root, f"job {place.job}", wait_seconds=_LOCK_SECONDS))
            end = run_to_end(
                [rank],
                grace_seconds=recipe.checkpoint.grace + _MARGIN_SECONDS,
                stop_signals=[signal.Signals[name] for name in recipe.checkpoint.signals],
            )
    except UserError as error:
        print(f"sft-dist: {error}", file=sys.stderr, flush=True)
        return _ended(at, place, record, fault, False)
    return _ended(at, place, record, end.code, end.stopped)


def _ended(at: SlurmDir, place: Place, record: RankRecord, code: int, stopped: bool) -> int:
    known = -(code - 128) if 128 < code < 128 + signal.NSIG else code
    changed = record.model_copy(update={"ended": now(), "code": known, "stopped": stopped})
    write_rank(at, place.job, place.restart, changed)
    return code


def command(run: RunDir, submission: Submission) -> list[str]:
    """The worker: unbuffered, so that a log is whole up to the moment its process is killed."""
    return [sys.executable, "-u", "-m", *(submission.module or ["sft_dist", str(run.recipe)])]


def environment(submission: Submission, place: Place, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the worker. Raises :class:`UserError`."""
    base = base_environment({name: word for name, word in given.items() if not name.startswith(_OWN)})
    threads = given.get("OMP_NUM_THREADS", "")
    return worker_environments(
        submission.strategy,
        place.tasks,
        master_addr=place.address,
        master_port=place.port,
        omp_num_threads=int(threads) if threads.isdigit() and int(threads) else submission.threads,
        base=base,
        node=place.node,
        nodes=place.nodes,
    )[place.local_rank]


def log_to(path: Path) -> None:
    """Send what this process and its children print to a log, each line with its time.

    The process that writes the log outlives this one, so that the last words of what is killed arrive.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_STAMP), str(path)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert stamp.stdin is not None
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (1, 2):
        os.dup2(stamp.stdin.fileno(), number)
    stamp.stdin.close()
