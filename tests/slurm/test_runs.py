"""Runs on a real Slurm: the numbers of a run on this machine, whatever the queue does to them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from launch.environment import ABSENT
from slurm.dev_cluster import DevCluster
from tests import tiny
from tests.distributed.test_environment import accelerate_nodes, base_environment
from tests.outcome import numbers, weights_hash
from tests.recipes import sft_dist, small_recipe
from tests.slurm.runs import ClusterRun

COMMON = ("train.report_to=none", "train.per_device_train_batch_size=2", "train.full_determinism=true",
          "train.save_strategy=steps", "train.save_steps=20", "train.max_steps=900", "train.learning_rate=1e-4",
          "eval.enabled=false", "data.dataset_test_split=null")  # fmt: skip

OF_A_LAUNCHER = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "ACCELERATE_", "FSDP_", "TORCH", "SUBMITIT_",
                 "SFT_DIST_RENDEZVOUS")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    small_recipe(folder, tiny.save_model(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    """The same run by two processes on this machine."""
    monkeypatch_module.setenv("OMP_NUM_THREADS", "1")
    done = sft_dist(folder, "run", "recipe.yaml", *COMMON, "parallel.processes=2", "output.output_dir=local")
    assert done.returncode == 0, done.stderr
    return folder / "local"


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def preempt(run: ClusterRun) -> None:
    """Jobs of a higher partition take all nodes for a moment."""
    run.cluster.run(["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null",
                     "--wrap=true"])  # fmt: skip


def kill_a_rank(run: ClusterRun) -> None:
    os.kill(run.workers()[1], signal.SIGKILL)


def reach_the_time_limit(run: ClusterRun) -> None:
    """The limit is lowered: Slurm sends its signal when no more than `signal_seconds` are left of it."""
    run.cluster.run(["scontrol", "update", f"JobId={run.job}", "TimeLimit=2"])


def kill_a_daemon(run: ClusterRun) -> None:
    """The processes on that node live on. Slurm would miss the node after 17 s; it is told at once."""
    node = run.starts()[-1].nodes[1]
    run.cluster.kill_slurmd(node)
    run.cluster.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead"])


def test_a_run_that_everything_happens_to_ends_with_the_weights_of_an_undisturbed_one(
    cluster: DevCluster, folder: Path, undisturbed: Path
) -> None:
    """Two nodes, one process each. After every strike: what was decided, and that no step was lost before the last
    checkpoint; at the end: every logged number and the weights, to the bit."""
    run = ClusterRun(cluster, folder, "struck", signal_seconds=118)
    done = run.submit(*COMMON)
    assert done.returncode == 0, done.stderr
    expected = [(kill_a_rank, "again"), (preempt, None), (reach_the_time_limit, "requeue"), (kill_a_daemon, None)]
    for number, (strike, _) in enumerate(expected, 1):
        before = run.steps()
        run.until(run.has_done(before + 30))
        done_steps = run.steps()
        strike(run)
        run.until(run.has_started(number + 1))
        if strike is reach_the_time_limit:
            run.cluster.run(["scontrol", "update", f"JobId={run.job}", "TimeLimit=10"])
        assert run.starts()[-1].step >= done_steps // 20 * 20
    run.until(run.is_done)
    assert [end.verdict for end in run.ends()] == [verdict for _, verdict in expected if verdict] + ["done"]
    killed, limit, _ = run.ends()
    assert killed.rank == 1 and "rank 1 on n1 was killed by SIGKILL" in killed.reason
    assert limit.reason == "time limit"
    dead = run.starts()[-2].nodes[1]
    assert dead not in run.starts()[-1].nodes
    cluster.start_slurmd(dead)
    assert numbers(run.root) == numbers(undisturbed)
    assert weights_hash(run.root) == weights_hash(undisturbed)


def test_two_nodes_of_two_have_the_losses_and_the_environment_of_four_processes(
    cluster: DevCluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*COMMON, "train.per_device_train_batch_size=1", "train.max_steps=60", "train.save_strategy=no")
    run = ClusterRun(cluster, folder, "four", gpus_per_node=2)
    done = run.submit(*words)
    assert done.returncode == 0, done.stderr
    run.until(run.has_done(1))
    workers = {rank: run.environment(pid) for rank, pid in run.workers().items()}
    run.until(run.is_done)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = sft_dist(folder, "run", "recipe.yaml", *words, "parallel.processes=4", "output.output_dir=local4")
    assert done.returncode == 0, done.stderr
    assert numbers(run.root) == numbers(folder / "local4")
    assert weights_hash(run.root) == weights_hash(folder / "local4")
    assert sorted(workers) == [0, 1, 2, 3]
    port = int(workers[0]["MASTER_PORT"])
    for rank, given in enumerate(accelerate_nodes(tmp_path, "ddp", nodes=2, processes=2, port=port)):
        # What the launcher was given itself is left out on both sides, as is what Slurm and its job have.
        wanted = {name: word for name, word in given.items() if name not in {*ABSENT, *base_environment()}}
        assert {name: word for name, word in workers[rank].items() if name in wanted} == wanted
        assert {name for name in workers[rank] if name.startswith(OF_A_LAUNCHER)} <= {*wanted, *os.environ}


def test_a_probe_looks_at_the_nodes_before_the_run_is_queued(cluster: DevCluster, folder: Path) -> None:
    run = ClusterRun(cluster, folder, "probed")
    done = run.submit(*COMMON, "--probe")
    assert done.returncode == 0, done.stderr
    assert "probe: 2 nodes see the run's folder and load the libraries" in done.stdout
    assert re.search(r"probe: all-reduce between two nodes: \d+\.\d\d GB/s in the median of 1 pairs", done.stdout)
    assert run.command("cancel", str(run.root)).returncode == 0


def test_what_a_probe_cannot_do_keeps_the_run_out_of_the_queue(cluster: DevCluster, folder: Path) -> None:
    run = ClusterRun(cluster, folder, "unprobed", python="/bin/false")
    done = run.submit(*COMMON, "--probe")
    assert done.returncode == 2
    assert re.search(r"^sft-dist: --probe: job \d+: .*; mend that before the run is queued$", done.stderr, re.MULTILINE)
    assert not (run.root / "recipe.yaml").exists()
