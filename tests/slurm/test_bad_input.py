"""What would fail in the queue is one line and exit code 2, before anything is queued or written."""

from __future__ import annotations

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


Command = Callable[..., tuple[int, str, list[str]]]
Refusal = Callable[..., list[str]]


@pytest.fixture
def command(
    cluster: DevCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """`sft-dist WORDS` in this process, for Python's start is most of its time: code, output and complaints."""
    for name, word in {**environment(folder), **cluster.environment, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, word)
    monkeypatch.chdir(folder)

    def here(*words: str) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = cli.main(list(words))
        said = capfd.readouterr()
        lines = said.err.splitlines()
        assert all(line.startswith("sft-dist: ") for line in lines), lines
        return code, said.out, [line.removeprefix("sft-dist: ") for line in lines]

    return here


@pytest.fixture
def refusal(cluster: DevCluster, folder: Path, command: Command) -> Refusal:
    """The lines that `submit` says, having touched nothing."""

    def refused(*words: str, nodes: int = 1, **profile: object) -> list[str]:
        run = ClusterRun(cluster, folder, **profile)
        before = tree(folder)
        code, _, lines = command("submit", "recipe.yaml", "--cluster", str(run.profile), "--nodes", str(nodes),
                                 "output.output_dir=run", *words)  # fmt: skip
        assert code == 2 and tree(folder) == before
        return [line.removeprefix(f"{run.profile}: ") for line in lines]

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


def test_a_run_in_the_queue_is_refused_and_cancelled(run: ClusterRun, command: Command) -> None:
    blocker = run.cluster.run(["sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null",
                               "--wrap=sleep 300"]).strip()  # fmt: skip
    submit = ("submit", "recipe.yaml", "--cluster", str(run.profile), "output.output_dir=run")
    try:
        run.cluster.wait_for(blocker, "RUNNING")
        # The command as it is typed, once.
        done = run.submit("parallel.global_batch_size=8", nodes=4)
        assert done.returncode == 0, done.stderr
        job = run.job
        assert run.cluster.job(job)["JobState"] == "PENDING"
        for words in (submit, (*submit, "output.overwrite=true"), ("resume", "run")):
            code, _, [line] = command(*words)
            assert code == 2
            assert f"belongs to job {job}, which is pending; wait for it, or end it: sft-dist cancel " in line
        assert command("cancel", "run")[0] == 0
        run.cluster.wait_for(job, "CANCELLED")
        code, _, [line] = command("cancel", "run")
        assert code == 2 and line == f"run: job {job} is not in the queue any more; nothing to cancel"
    finally:
        run.cluster.run(["scancel", blocker])


@pytest.mark.parametrize("verb", ["resume", "cancel"])
def test_what_is_no_run_is_one_line(command: Command, verb: str) -> None:
    for name, said in (("nowhere", "nowhere: no such folder"), (".", ".: was not submitted to Slurm")):
        code, _, [line] = command(verb, name)
        assert code == 2 and line.startswith(said)


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
    cluster: DevCluster, folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run in three jobs: the second is `sbatch RUN/slurm/job.sh`, the third `sft-dist resume` from elsewhere."""
    run = ClusterRun(cluster, folder, "by hand")
    root = str(run.root)
    monkeypatch.setenv("WANDB_API_KEY", "shibboleth")
    code, said, _ = command(
        "submit", "recipe.yaml", "--cluster", str(run.profile), "output.output_dir=by hand", "train.max_steps=120",
        "train.save_strategy=steps", "train.save_steps=20", "train.report_to=none", "eval.enabled=false",
        "data.dataset_test_split=null",
    )  # fmt: skip
    assert code == 0, said
    first = run.job
    run.until(run.has_done(25))
    code, _, [line] = command("resume", root)
    assert code == 2 and f"belongs to job {first}, which is running" in line
    assert [run.environment(pid)["WANDB_API_KEY"] for pid in run.workers().values()] == ["shibboleth"]
    assert command("cancel", root)[0] == 0
    cluster.wait_for(first, "CANCELLED")
    run.until(lambda: not run.workers())

    second = cluster.run(["sbatch", "--parsable", str(run.at.script)]).strip()
    run.until(lambda: run.has_started(2)() and run.steps() >= run.starts()[-1].step + 10)
    assert run.starts()[-1].job == second == run.job and run.starts()[-1].step >= 20
    assert not run.at.cancelled.exists()
    assert command("cancel", root)[0] == 0
    cluster.wait_for(second, "CANCELLED")
    run.until(lambda: not run.workers())

    monkeypatch.chdir(tmp_path)
    code, said, _ = command("resume", root)
    assert code == 0, said
    run.until(run.is_done)
    assert [one["step"] for one in records(run.root)] == list(range(1, 121))
    assert command("resume", root) == (0, f"{root} is done: nothing to go on with\n", [])
    for path in run.root.rglob("*"):
        assert not path.is_file() or b"shibboleth" not in path.read_bytes(), path
