"""The cluster on one machine: it is a Slurm, it comes up at once, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from slurm.dev_cluster import DevCluster, keeper
from slurm.dev_cluster.control import daemons, holder
from tests.recipes import ROOT
from tests.slurm.conftest import need_slurm

SLEEP = "srun sleep 300"


def submit(cluster: DevCluster, *words: str, body: str = SLEEP) -> str:
    output = f"--output={cluster.folder}/%j.out"
    return cluster.run(["sbatch", "--parsable", output, "--open-mode=append", *words, f"--wrap={body}"]).strip()


def output(cluster: DevCluster, job: str) -> list[str]:
    file = cluster.folder / f"{job}.out"
    return file.read_text().splitlines() if file.exists() else []


def until(done: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def parts(folder: Path) -> set[int]:
    """All processes of a cluster: its daemons, what runs its jobs, and these."""
    return keeper.strays(folder)


def run_by(command: list[str], **words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, **words)  # type: ignore[call-overload]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test's own, for paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield Path(folder)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    need_slurm()
    started = [sys.executable, "-m", "launch.cli", "dev-cluster", *words]
    return subprocess.run(started, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def test_it_is_up_within_5_seconds_and_leaves_nothing(new_cluster: Callable[..., DevCluster]) -> None:
    began = time.monotonic()
    cluster = new_cluster()
    assert time.monotonic() - began < 5
    assert cluster.node_states() == dict.fromkeys(["n0", "n1", "n2", "n3"], "idle")
    running = submit(cluster)
    cluster.wait_for(running, "RUNNING")
    until(lambda: len(parts(cluster.folder)) > 7)
    cluster.stop()
    assert not parts(cluster.folder)
    assert not cluster.folder.exists()


def test_a_job_of_two_nodes_runs_on_gpus_that_are_counted(cluster: DevCluster) -> None:
    body = "srun sh -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    first = submit(cluster, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", body=body)
    single = submit(cluster, "--gpus-per-node=1", body=body)
    cluster.wait_for(first, "COMPLETED")
    assert sorted(output(cluster, first)) == ["n0 0,1", "n0 0,1", "n1 0,1", "n1 0,1"]
    cluster.wait_for(single, "COMPLETED")
    assert output(cluster, single)[0].split()[1] == "0"
    with pytest.raises(Exception, match=r"sbatch: .*Requested node configuration is not available"):
        submit(cluster, "--gpus-per-node=3")


def test_a_job_that_is_preempted_goes_back_to_the_queue_and_starts_again(cluster: DevCluster) -> None:
    whole = ("--nodes=4", "--gpus-per-node=2")
    victim = submit(cluster, *whole)
    cluster.wait_for(victim, "RUNNING")
    urgent = submit(cluster, *whole, "--partition=urgent", body="true")
    cluster.wait_for(victim, "PENDING")
    assert cluster.job(victim)["Restarts"] == "1"
    cluster.wait_for(urgent, "COMPLETED")
    cluster.begin_now(victim)
    cluster.wait_for(victim, "RUNNING")
    # Of no effect, and no error, on a job that does not wait.
    cluster.begin_now(victim)
    cluster.run(["scancel", victim])


def test_a_job_with_grace_is_told_before_it_is_preempted(cluster: DevCluster) -> None:
    told = "trap 'echo told; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    victim = submit(cluster, "--nodes=4", "--gpus-per-node=2", "--partition=graceful", body=f'srun sh -c "{told}"')
    cluster.wait_for(victim, "RUNNING")
    until(lambda: output(cluster, victim).count("ready") == 4)
    urgent = submit(cluster, "--nodes=4", "--gpus-per-node=2", "--partition=urgent", body="true")
    cluster.wait_for(urgent, "COMPLETED")
    assert output(cluster, victim).count("told") == 4


def test_the_job_of_a_node_that_dies_starts_again_on_others(cluster: DevCluster) -> None:
    job = submit(cluster, "--nodes=2")
    cluster.wait_for(job, "RUNNING")
    assert cluster.job(job)["NodeList"] == "n[0-1]"
    try:
        cluster.kill_node("n1")
        cluster.wait_for(job, "PENDING")
        cluster.begin_now(job)
        cluster.wait_for(job, "RUNNING")
        assert "n1" not in cluster.run(["scontrol", "show", "hostnames", cluster.job(job)["NodeList"]]).split()
    finally:
        cluster.run(["scancel", job])
        cluster.start_slurmd("n1")
    cluster.wait_for_nodes()


def test_the_controller_comes_back_with_the_jobs_that_it_knew(new_cluster: Callable[..., DevCluster]) -> None:
    cluster = new_cluster(nodes=1, gpus=0)
    job = submit(cluster, "--hold")
    # Slurm writes down what it knows every few seconds.
    until(lambda: (cluster.folder / "state" / f"hash.{int(job) % 10}" / f"job.{job}").exists())
    until((cluster.folder / "state" / "job_state").exists)
    cluster.kill_controller()
    assert "slurmctld" in [name for name, pid in daemons(cluster.folder).items() if pid is None]
    cluster.start_controller()
    assert cluster.job(job)["JobState"] == "PENDING"


def test_two_clusters_do_not_know_of_each_other(cluster: DevCluster, new_cluster: Callable[..., DevCluster]) -> None:
    other = new_cluster(nodes=2, gpus=1, cpus=8)
    assert other.folder != cluster.folder
    assert len(cluster.node_states()) == 4
    assert other.node_states() == {"n0": "idle", "n1": "idle"}
    assert other.run(["sinfo", "--noheader", "--partition=main", "--format=%c %G"]).split() == ["8", "gpu:1"]
    other.stop()
    assert cluster.run(["scontrol", "ping"]).count("UP") == 1


@pytest.mark.parametrize("victim", ["owner", "keeper"])
def test_nothing_is_left_when_the_owner_or_the_keeper_is_killed(home: Path, victim: str) -> None:
    need_slurm()
    at = home / "c"
    owner = run_by([sys.executable, "-m", "launch.cli", "dev-cluster", "up", "--foreground", "--folder", str(at)])
    assert owner.stdout is not None
    conf = owner.stdout.readline().strip().removeprefix("export SLURM_CONF=")
    environment = os.environ | {"SLURM_CONF": conf}
    # A process that has left its session and its parent is still one of the job's.
    body = "srun sh -c 'setsid -f sleep 300; sleep 300'"
    subprocess.run(["sbatch", f"--output={at}/job", f"--wrap={body}"], env=environment, check=True, capture_output=True)
    until(lambda: any("sleep" in name(pid) for pid in parts(at)))
    kept = holder(at)
    assert kept is not None and len(parts(at)) > 8
    os.kill({"owner": owner.pid, "keeper": kept}[victim], signal.SIGKILL)
    owner.wait(20)
    until(lambda: not parts(at) and holder(at) is None)
    owner.stdout.close()


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def test_the_command_starts_shows_and_ends_a_cluster(home: Path) -> None:
    up = command("up", "--nodes", "2", "--gpus", "1")
    assert up.returncode == 0, up.stderr
    conf = Path(up.stdout.strip().removeprefix("export SLURM_CONF="))
    try:
        profile = yaml.safe_load((conf.parent / "cluster.yaml").read_text())
        assert profile == {"partition": "main", "gpus_per_node": 1, "tasks_per_node": 1, "cpus_per_task": 1,
                           "time": "0:10:00", "shared_folder": "/", "requeue": {"max": 20}}  # fmt: skip
        again = command("up")
        assert again.returncode == 2 and again.stderr.count("\n") == 1 and "is up there already" in again.stderr
        os.kill(daemons(conf.parent)["n1"] or 0, signal.SIGKILL)
        until(lambda: daemons(conf.parent)["n1"] is None)
        shown = command("status")
        assert shown.returncode == 0, shown.stderr
        assert "3 of 4 daemons alive, dead: n1" in shown.stdout and "gpu:1" in shown.stdout
    finally:
        down = command("down")
    assert down.returncode == 0 and "ended" in down.stderr
    assert not parts(conf.parent) and not conf.exists()
    nothing = command("down")
    assert nothing.returncode == 0 and "no dev-cluster is up" in nothing.stderr and nothing.stderr.count("\n") == 1
    assert command("status").returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--nodes", "0"], "0 is no number from 1 to 64"),
        (["up", "--folder", "/tmp/a b"], "letters that have a meaning in slurm.conf"),
        (["up", "--folder", "/tmp/" + "a" * 100], "too long for the path of a socket"),
        (["up", "--folder", "/proc/nothing"], "--folder: /proc/nothing"),
        (["up", "--folder", "/"], "--folder: / has run already, which is no dev-cluster's"),
        (["fly"], "invalid choice"),
    ],
)
def test_bad_words_are_one_line(home: Path, words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_where_slurm_is_missing_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import cli
    from slurm.dev_cluster import programs

    monkeypatch.setattr(programs, "_PATH", "/nowhere")
    assert cli.main(["dev-cluster", "up"]) == 2
    said = capsys.readouterr().err
    assert "apt-get install slurm-wlm munge" in said and "dnf install" in said and said.count("\n") == 1
    monkeypatch.setattr(programs.sys, "platform", "darwin")
    assert cli.main(["dev-cluster", "up"]) == 2
    assert "run on Linux only" in capsys.readouterr().err


def test_an_ordinary_user_can_start_one() -> None:
    need_slurm()
    with tempfile.TemporaryDirectory(prefix="user-") as folder:
        code = (
            "from slurm.dev_cluster import DevCluster\n"
            "with DevCluster(nodes=2) as cluster:\n"
            "    job = cluster.run(['sbatch', '--parsable', '--nodes=2', f'--output={cluster.folder}/o',"
            " '--wrap=srun id -u']).strip()\n"
            "    cluster.wait_for(job, 'COMPLETED')\n"
            "    print((cluster.folder / 'o').read_text())\n"
        )
        os.chmod(folder, 0o755)
        for part in ("slurm", "launch", "sft_dist"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", "recipes"))
        other = _another_user()
        done = subprocess.run([*other.pop("python"), "-c", code], cwd=folder, env={"PATH": os.environ["PATH"]},
                              capture_output=True, text=True, check=False, timeout=60, **other)  # fmt: skip
    assert done.returncode == 0, done.stderr
    user = str(other.get("user", os.getuid()))
    assert done.stdout.split() == [user, user] and user != "0"


def _another_user() -> dict[str, object]:
    """This user and its Python, or for root one that has no rights, and a Python that it may run."""
    if os.getuid() != 0:
        return {"python": [sys.executable]}
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    for python in (sys.executable, "/usr/bin/python3"):
        newer = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(newer, check=False, cwd="/", **nobody).returncode == 0:
                return {"python": [python], **nobody}
        except OSError:
            continue
    pytest.skip("needs a Python that other users can run")
