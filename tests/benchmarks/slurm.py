"""What Slurm costs: `python -m tests.benchmarks.slurm`, on a Slurm of its own on this machine (about three minutes).

Prints the table of docs/benchmarks.md. Times are wall-clock seconds; each is the median of three, and `submit` and
bare `srun` take turns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from launch.place import Place
from launch.slurm import submit
from launch.slurm.profile import read_profile
from launch.slurm.records import read_ranks, seconds
from launch.slurm.submit import Job
from sft_dist.recipe import load_recipe
from slurm.dev_cluster import DevCluster
from tests import tiny
from tests.recipes import environment, small_recipe
from tests.slurm.runs import ClusterRun

TIMES = 3
COMMON = ("train.report_to=none", "train.per_device_train_batch_size=1", "eval.enabled=false",
          "data.dataset_test_split=null", "train.max_steps=60", "train.save_strategy=steps",
          "train.save_steps=10")  # fmt: skip
# What a script by hand gives to the workers of `srun`.
BARE = """
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=2 GROUP_RANK=$SLURM_NODEID
export MASTER_ADDR=127.0.0.1 MASTER_PORT=29871 ACCELERATE_MIXED_PRECISION=no
exec {python} -u -m sft_dist {recipe} {words} > {log}.$SLURM_PROCID 2>&1
"""
_RENDEZVOUS = """
import os, sys, time, torch.distributed as dist
dist.init_process_group("gloo"); dist.barrier()
open(sys.argv[1] + f"/met-{dist.get_rank()}", "w").write(str(time.time()))
dist.destroy_process_group()
"""


def until(condition: Callable[[], bool], limit: float = 240.0) -> float:
    """The time at which something is so."""
    end = time.time() + limit
    while not condition():
        assert time.time() < end, "it never came"
        time.sleep(0.005)
    return time.time()


def began(folder: Path, count: int) -> Callable[[], bool]:
    """Whether so many processes have begun that work in a run's folder."""

    def look() -> bool:
        found = 0
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit():
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    found += b"sft_dist" in words and any(str(folder).encode() in word for word in words)
        return found >= count

    return look


def logged(path: Path) -> Callable[[], bool]:
    return lambda: path.exists() and path.read_text().count('"loss"') >= 1


def submitted(cluster: DevCluster, folder: Path, number: int) -> tuple[float, float]:
    """Seconds from the command to the last worker's beginning, and to the first step."""
    run = ClusterRun(cluster, folder, f"submitted{number}", gpus_per_node=2)
    start = time.time()
    command = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "submit", str(folder / "recipe.yaml"), "--cluster", str(run.profile),
         "--nodes", "2", f"output.output_dir={run.root}", *COMMON],
        env={**environment(folder), **cluster.environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    first = until(began(run.root / "recipe.yaml", 4)) - start
    step = until(logged(run.root / "metrics.jsonl")) - start
    assert command.wait() == 0
    run.until(run.is_done)
    return first, step


def bare(cluster: DevCluster, folder: Path, number: int) -> tuple[float, float]:
    """The same by srun."""
    root = folder / f"bare{number}"
    script = folder / f"bare{number}.sh"
    words = " ".join([f"output.output_dir={root}", *COMMON])
    script.write_text(BARE.format(python=sys.executable, recipe=folder / "recipe.yaml", words=words, log=root))
    start = time.time()
    command = subprocess.Popen(
        ["srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", str(script)],
        env={**environment(folder), **cluster.environment, "OMP_NUM_THREADS": "1"},
    )
    first = until(began(root, 4)) - start
    step = until(logged(root / "metrics.jsonl")) - start
    assert command.wait() == 0
    return first, step


def killed(cluster: DevCluster, folder: Path) -> tuple[float, float]:
    """Seconds from a rank's death to the next attempt's beginning, and to its first step."""
    run = ClusterRun(cluster, folder, "killed", gpus_per_node=2)
    done = run.submit(*COMMON, "train.max_steps=400")
    assert done.returncode == 0, done.stderr
    run.until(run.has_done(15))
    start = time.time()
    os.kill(run.workers()[3], signal.SIGKILL)
    until(run.has_started(2))
    again = seconds(run.starts()[1].at) - start
    log = run.root / "logs" / "rank0.log"
    until(lambda: any("step " in line and _at(line) > start + again for line in log.read_text().splitlines()))
    first = next(_at(line) for line in log.read_text().splitlines() if "step " in line and _at(line) > start + again)
    run.until(run.is_done)
    return again, first - start


def _at(line: str) -> float:
    try:
        return datetime.fromisoformat(line.split(" ", 1)[0]).timestamp()
    except ValueError:
        return 0.0


def rendezvous(folder: Path, nodes: int, tasks: int) -> tuple[float, float]:
    """Seconds from the step's first task to the last rank behind a barrier, and of that from the last task on."""
    with DevCluster(nodes=nodes, gpus=tasks, cpus=tasks) as cluster:
        run = ClusterRun(cluster, folder, "rendezvous", gpus_per_node=tasks)
        recipe = load_recipe(folder / "recipe.yaml", [f"output.output_dir={run.root}"])
        (folder / "meeting.py").write_text(_RENDEZVOUS)
        old = dict(os.environ)
        os.environ.update({**environment(folder), **cluster.environment, "OMP_NUM_THREADS": "1"})
        os.environ["PYTHONPATH"] = f"{folder}:{os.environ['PYTHONPATH']}"
        try:
            place = Place([], tasks, nodes, is_here=False)
            job = Job(recipe, read_profile(run.profile), "cluster", place, module=("meeting", str(folder)),
                      result=folder / "met-0")  # fmt: skip
            submit.submit(job, ["benchmark"])
        finally:
            os.environ.clear()
            os.environ.update(old)
        last = until(lambda: len(list(folder.glob("met-*"))) == nodes * tasks)
        run.until(run.is_done)
        starts = sorted(seconds(one.started) for one in read_ranks(run.at, run.job, 0))
    return last - starts[0], last - starts[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_recipe(folder, tiny.save_model(folder / "model"))
        ours, theirs = [], []
        with DevCluster(nodes=4, gpus=2) as cluster:
            submitted(cluster, folder, 99)  # fills the cache of prepared data
            for number in range(TIMES):
                theirs.append(bare(cluster, folder, number))
                ours.append(submitted(cluster, folder, number))
            died = killed(cluster, folder)
        met = rendezvous(folder, 4, 8)
    print("| 2 nodes x 2 processes, seconds | `sft-dist submit` | bare `srun` | ratio |\n|---|---|---|---|")
    for number, what in enumerate(("from the command to the last worker's process", "to the first step")):
        one, other = (statistics.median(pair[number] for pair in pairs) for pairs in (ours, theirs))
        print(f"| {what} | {one:.1f} | {other:.1f} | {one / other:.2f} |")
    print(f"\nA rank killed: {died[0]:.1f} s to the next attempt on the same nodes, {died[1]:.1f} s to its first step.")
    print(f"32 ranks over 4 nodes meet {met[0]:.1f} s after the first task began, {met[1]:.1f} s after the last.")


if __name__ == "__main__":
    main()
