"""What would fail in the queue is one line and exit code 2, before anything is queued or written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import cli
from slurm.dev_cluster import DevCluster
from tests import tiny
from tests.recipes import environment, records, small_recipe
from tests.slurm.runs import ClusterRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    small_recipe(folder, tiny.save_model(folder / "model"))
    return folder


@pytest.fixture
def run(cluster: DevCluster, folder: Path) -> Iterator[ClusterRun]:
    run = ClusterRun(cluster, folder)
    yield run
    if run.at.submission.exists():
        cluster.run(["scancel", "--quiet", run.job])


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


Refusal = Callable[..., list[str]]


@pytest.fixture
def refusal(
    cluster: DevCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refusal:
    """The lines that `submit` says, having touched nothing. In this process, for Python's start is most of its time."""
    for name, word in {**environment(folder), **cluster.environment}.items():
        monkeypatch.setenv(name, word)
    monkeypatch.chdir(folder)

    def refused(*words: str, nodes: int = 1, **profile: object) -> list[str]:
        run = ClusterRun(cluster, folder, **profile)
        before = tree(folder)
        capfd.readouterr()
        assert cli.main(["submit", "recipe.yaml", "--cluster", str(run.profile), "--nodes", str(nodes),
                         "output.output_dir=run", *words]) == 2  # fmt: skip
        assert tree(folder) == before
        lines = capfd.readouterr().err.splitlines()
        assert all(line.startswith("sft-dist: ") for line in lines)
        return [line.removeprefix("sft-dist: ").removeprefix(f"{run.profile}: ") for line in lines]

    return refused


@pytest.mark.parametrize(
    ("profile", "nodes", "said"),
    [
        (
            {"partition": "fast"},
            1,
            "partition: this cluster has no partition fast; take one of main, urgent, graceful, short",
        ),
        ({"account": "physics"}, 1, "account: this cluster keeps no accounts and knows no account physics; leave it"),
        ({"qos": "high"}, 1, "qos: this cluster keeps no accounts and knows no qos high; leave it out"),
        ({}, 5, "--nodes: 5 is more than the 4 that a job gets in partition main; ask for fewer"),
        ({"time": "2:00:00"}, 1, "time: 2:00:00 is longer than the 01:00:00 of the partition main; lower it"),
        ({"gpus_per_node": 3}, 1, "ask for fewer nodes, or less of a node (gpus_per_node, "),
        ({"gpu_type": "h100"}, 1, "ask for fewer nodes, or less of a node (gpus_per_node, gpu_type, "),
        ({"memory_per_node": "90T"}, 1, "ask for fewer nodes, or less of a node (gpus_per_node, gpu_type, "),
        ({"constraint": "infiniband"}, 1, "constraint: Slurm says: "),
        ({"gpus_per_node": 2, "tasks_per_node": 4}, 1, "tasks_per_node: 4 processes on 2 GPUs; make it one per GPU"),
        ({"shared_folder": "/nowhere"}, 1, "shared_folder: no such folder: /nowhere; name one that all nodes see"),
        ({"signal_seconds": 30}, 1, "signal_seconds: 30 s before the time limit is not more than the 60 s of checkpoi"),
        ({"partitoin": "main"}, 1, "partitoin: no such key, did you mean partition"),
        ({"time": "1"}, 1, "signal_seconds: 120 s before the end leaves nothing of a time limit of 1; lower it, or "),
    ],
)
def test_what_a_cluster_does_not_have_is_refused(
    refusal: Refusal, profile: dict[str, object], nodes: int, said: str
) -> None:
    lines = refusal("train.per_device_train_batch_size=1", "parallel.global_batch_size=60", nodes=nodes, **profile)
    assert len(lines) == 1 and said in lines[0], lines


def test_what_lies_where_the_nodes_do_not_see_it_is_refused(refusal: Refusal) -> None:
    lines = refusal(shared_folder="/usr")
    assert [line.split(": ")[0] for line in lines] == [
        "output.output_dir", "the working folder", "model.model_name_or_path", "data.dataset_name",
        "data.dataset_test_split",
    ]  # fmt: skip
    assert all("is not in /usr (shared_folder of " in line and "the nodes cannot see it; move it" in line
               for line in lines)  # fmt: skip


def test_a_script_is_shown_and_nothing_is_touched(run: ClusterRun) -> None:
    before = tree(run.folder)
    done = run.submit("--print")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash" and lines[-1] == 'exit "$code"'
    for word in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=1", "#SBATCH --partition=main", "#SBATCH --requeue"):
        assert word in lines
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)
    assert tree(run.folder) == before
    assert not run.cluster.run(["squeue", "--noheader"])


def test_a_run_in_the_queue_is_refused_and_cancelled(run: ClusterRun) -> None:
    blocker = run.cluster.run(["sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null",
                               "--wrap=sleep 300"]).strip()  # fmt: skip
    try:
        run.cluster.wait_for(blocker, "RUNNING")
        done = run.submit("parallel.global_batch_size=8", nodes=4)
        assert done.returncode == 0, done.stderr
        job = run.job
        assert run.cluster.job(job)["JobState"] == "PENDING"
        for again in (run.submit(nodes=1), run.submit("output.overwrite=true"), run.command("resume", str(run.root))):
            assert again.returncode == 2
            assert f"belongs to job {job}, which is pending; wait for it, or end it: sft-dist cancel" in again.stderr
            assert again.stderr.count("\n") == 1
        assert run.command("cancel", str(run.root)).returncode == 0
        run.cluster.wait_for(job, "CANCELLED")
        twice = run.command("cancel", str(run.root))
        assert twice.returncode == 2 and twice.stderr.count("\n") == 1 and "nothing to cancel" in twice.stderr
    finally:
        run.cluster.run(["scancel", blocker])


@pytest.mark.parametrize("verb", ["resume", "cancel"])
def test_what_is_no_run_is_one_line(cluster: DevCluster, folder: Path, verb: str) -> None:
    run = ClusterRun(cluster, folder)
    for name, said in (("nowhere", "nowhere: no such folder"), (".", ".: was not submitted to Slurm")):
        done = run.command(verb, name)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


def test_a_controller_that_is_away_is_one_line(new_cluster: Callable[..., DevCluster], folder: Path) -> None:
    cluster = new_cluster(nodes=1, gpus=0)
    run = ClusterRun(cluster, folder, "away", gpus_per_node=0)
    cluster.kill_controller()
    began = time.monotonic()
    done = run.submit(nodes=1)
    assert time.monotonic() - began < 25
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "squeue: " in done.stderr and "try again later" in done.stderr
    assert not run.root.exists()
    # The script can be shown without Slurm's answer.
    assert run.submit("--print").returncode == 0


@pytest.mark.parametrize("words", [(), ("--print",)])
def test_a_machine_without_slurm_is_one_line(
    refusal: Refusal, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    [line] = refusal(*words)
    assert line.endswith("no such command: there is no Slurm here; log in to a node that has it")


def test_a_run_is_cancelled_gone_on_with_by_hand_and_resumed_to_its_end(
    cluster: DevCluster, folder: Path, tmp_path: Path
) -> None:
    """One run in three jobs: the second is `sbatch RUN/slurm/job.sh`, the third `sft-dist resume` from elsewhere."""
    run = ClusterRun(cluster, folder, "thrice")
    steps = ("train.max_steps=400", "train.save_strategy=steps", "train.save_steps=20", "train.report_to=none",
             "eval.enabled=false", "data.dataset_test_split=null")  # fmt: skip
    os.environ["WANDB_API_KEY"] = "secret-of-the-tests"
    try:
        done = run.submit(*steps, "output.output_dir=thrice", nodes=1)
        assert done.returncode == 0, done.stderr
    finally:
        del os.environ["WANDB_API_KEY"]
    first = run.job
    run.until(run.has_done(25))
    assert [run.environment(pid)["WANDB_API_KEY"] for pid in run.workers().values()] == ["secret-of-the-tests"]
    again = run.command("resume", str(run.root))
    assert again.returncode == 2 and f"belongs to job {first}, which is running" in again.stderr
    assert run.command("cancel", str(run.root)).returncode == 0
    run.cluster.wait_for(first, "CANCELLED")
    run.until(lambda: not run.workers())
    second = run.cluster.run(["sbatch", "--parsable", str(run.at.script)]).strip()
    run.until(lambda: run.has_started(2)() and run.steps() >= run.starts()[-1].step + 10)
    assert run.starts()[-1].job == second == run.job and run.starts()[-1].step >= 20
    assert not run.at.cancelled.exists()
    assert run.command("cancel", str(run.root)).returncode == 0
    run.cluster.wait_for(second, "CANCELLED")
    run.until(lambda: not run.workers())
    elsewhere = ClusterRun(run.cluster, tmp_path)
    done = elsewhere.command("resume", str(run.root))
    assert done.returncode == 0, done.stderr
    run.until(run.is_done)
    assert [one["step"] for one in records(run.root)] == list(range(1, 401))
    done = elsewhere.command("resume", str(run.root))
    assert done.returncode == 0 and "is done: nothing to go on with" in done.stdout
    for path in run.root.rglob("*"):
        assert not path.is_file() or b"secret-of-the-tests" not in path.read_bytes(), path
