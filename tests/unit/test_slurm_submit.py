"""Submitting a run: what is written, what Slurm is given, and that no secret is in any of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import command, precheck, submit, task
from launch.slurm.profile import Profile
from launch.slurm.records import SlurmDir, read_submission
from launch.slurm.submit import Job
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from tests.recipes import ROOT, write_recipe
from tests.unit.test_control_plane import HEAVY

# Says what it was given, and keeps the script and the environment.
SBATCH = """#!/bin/bash
printf '%s\\n' "$@" > "$KEPT/words"; cat "${@: -1}" > "$KEPT/script"; env > "$KEPT/environment"
[ -z "$REFUSED" ] || { echo "sbatch: error: $REFUSED" >&2; exit 1; }
echo 'Submitted batch job 31'
"""
Asked = Callable[..., Job]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands, and a current folder of the test's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    make(folder, "sbatch", SBATCH)
    make(folder, "squeue", '#!/bin/sh\necho "$QUEUE"\n')
    for name in ("srun", "scancel"):
        make(folder, name, f'#!/bin/sh\necho {name} "$@" >> "$KEPT/asked"\n')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("KEPT", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def make(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o700)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", model={"model_name_or_path": "m"},
                                    data={"dataset_name": "d.jsonl"}, parallel={"strategy": "ddp"},
                                    output={"output_dir": "runs/one"}))  # fmt: skip


@pytest.fixture
def asked(programs: Path, recipe: Recipe) -> Asked:
    return lambda nodes=2, **profile: submit.job(recipe, Profile(**profile), "c.yaml", nodes)


def test_a_run_is_submitted_with_everything_that_repeats_it(asked: Asked, tmp_path: Path) -> None:
    submission = submit.submit(asked(partition="gpu", tasks_per_node=3), ["sft-dist", "submit"])
    at = SlurmDir(tmp_path / "runs" / "one")
    assert read_submission(at) == submission
    assert (submission.job_id, submission.nodes, submission.tasks_per_node) == ("31", 2, 3)
    assert (submission.strategy, submission.folder, submission.partition) == ("ddp", str(tmp_path), "gpu")
    held = load_recipe(at.root / "recipe.yaml")
    assert held.output.resume and not held.output.overwrite
    assert "submitit==" in at.lock.read_text() and "partition: gpu" in at.profile.read_text()
    assert not (at.root / "run.lock").exists()
    # What was queued is what is kept, but for the name of submitit's file.
    assert at.script.read_text() == (tmp_path / "bin" / "script").read_text()


def test_nothing_that_is_written_or_asked_holds_a_secret(
    asked: Asked, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "shibboleth")
    submit.submit(asked(gpus_per_node=1), ["sft-dist", "submit", "train.hub_token=shibboleth"])
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) >= 9
    for path in [*files, programs / "words", programs / "script"]:
        assert b"shibboleth" not in path.read_bytes(), path
    # Slurm hands it on to the job.
    assert (programs / "environment").read_text().count("=shibboleth\n") == 3


def test_all_that_is_written_is_its_owners_alone(asked: Asked, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        submit.submit(asked(), ["sft-dist", "submit"])
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    for path in [tmp_path / "runs" / "one", *(tmp_path / "runs" / "one").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def test_the_kept_task_is_what_submitit_runs(asked: Asked, tmp_path: Path) -> None:
    submit.submit(asked(), ["sft-dist", "submit"])
    from submitit.core.utils import DelayedSubmission

    at = SlurmDir(tmp_path / "runs" / "one")
    for path in (at.task, at.folder / "31_submitted.pkl"):
        function = DelayedSubmission.load(path).function
        assert isinstance(function, task.Task) and function.root == str(at.root)
        assert isinstance(function.checkpoint().function, task.Task)


def test_a_refusal_of_sbatch_is_one_line_and_the_run_can_be_resumed(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "Batch job submission failed: Job violates accounting/QOS policy")
    with pytest.raises(UserError) as error:
        submit.submit(asked(), ["sft-dist", "submit"])
    line = str(error.value)
    assert "\n" not in line and "Job violates accounting/QOS policy" in line
    assert line.endswith("nothing was queued; mend it, then sft-dist resume runs/one")
    held = read_submission(SlurmDir(tmp_path / "runs" / "one"))
    assert held is not None and held.job_id is None
    with pytest.raises(UserError, match="was never queued; nothing to cancel"):
        command.cancel("runs/one")


@pytest.mark.parametrize("spelling", ["{root}/runs/one", "{root}/link/one"])
def test_a_run_in_the_queue_is_found_by_its_folder(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    held = [("29", "PENDING", "/other"), ("30_2", "RUNNING", spelling.format(root=tmp_path)), ("31", "PENDING", "")]
    lines = [f"{job}|{state}|None|N/A|N/A|N/A||main|{comment}" for job, state, comment in held]
    monkeypatch.setenv("QUEUE", "\n".join(lines))
    with pytest.raises(UserError, match="runs/one belongs to job 30_2, which is running; wait for it, or end it"):
        submit.submit(asked(), ["sft-dist", "submit"])
    assert not (tmp_path / "bin" / "words").exists()


def test_a_job_is_cancelled_only_while_it_is_in_the_queue(
    asked: Asked, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit.submit(asked(), ["sft-dist", "submit"])
    at = SlurmDir(tmp_path / "runs" / "one")
    monkeypatch.setenv("QUEUE", "")
    with pytest.raises(UserError, match="runs/one: job 31 is not in the queue any more; nothing to cancel"):
        command.cancel("runs/one")
    assert not at.cancelled.exists() and not (programs / "asked").exists()
    monkeypatch.setenv("QUEUE", "RUNNING")
    assert command.cancel("runs/one") == 0
    assert at.cancelled.exists() and (programs / "asked").read_text() == "scancel 31\n"
    # Where Slurm cannot be told, the run is not marked.
    at.cancelled.unlink()
    make(programs, "scancel", "#!/bin/sh\necho 'scancel: error: Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match="scancel: Slurm does not answer"):
        command.cancel("runs/one")
    assert not at.cancelled.exists()


@pytest.mark.parametrize(
    ("words", "profile", "processes"),
    [({}, {}, 1), ({}, {"gpus_per_node": 4}, 4), ({}, {"gpus_per_node": 4, "tasks_per_node": 2}, 2),
     ({"processes": 3}, {"gpus_per_node": 4, "tasks_per_node": 2}, 3)],
)  # fmt: skip
def test_the_processes_of_a_node(
    recipe: Recipe, words: dict[str, int], profile: dict[str, Any], processes: int
) -> None:
    changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=words)})
    made = submit.job(changed, Profile(nodes=3, **profile), "c.yaml", None)
    assert (made.place.nodes, made.place.processes, made.place.world) == (3, processes, 3 * processes)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Invalid account or account/partition combination specified", "c.yaml: account: Slurm says: "),
        ("Invalid qos specification", "c.yaml: qos: Slurm says: "),
        ("Requested time limit is invalid (missing or exceeds some limit)", "c.yaml: time: Slurm says: "),
        ("Memory specification can not be satisfied", "c.yaml: memory_per_node: Slurm says: "),
        ("Something new", "c.yaml: Slurm says: "),
    ],
)
def test_what_sbatch_finds_is_said_by_the_key_that_is_meant(programs: Path, said: str, line: str) -> None:
    make(programs, "sbatch", f"#!/bin/sh\ncat > /dev/null\necho 'allocation failure: {said}' >&2; exit 1\n")
    with pytest.raises(UserError) as error:
        precheck.test_only("#!/bin/bash\n", "c.yaml")
    assert str(error.value).startswith(line) and said in str(error.value) and "\n" not in str(error.value)


def test_tasks_that_are_not_dealt_out_node_by_node_are_one_line() -> None:
    given = {"SFT_DIST_RENDEZVOUS": "10.0.0.1 20007 1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_ID": "31",
             "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURMD_NODENAME": "n1"}  # fmt: skip
    place = task.Place.from_environment(given)
    assert (place.rank, place.local_rank, place.node, place.tasks, place.restart) == (2, 0, 1, 2, 1)
    with pytest.raises(UserError, match=r"task 1 is number 0 on node 1: 4 tasks are not dealt out evenly over 2 nodes"):
        task.Place.from_environment(given | {"SLURM_PROCID": "1"})


def test_no_module_for_slurm_imports_torch() -> None:
    names = [f"launch.slurm.{path.stem}" for path in (ROOT / "launch" / "slurm").glob("*.py")]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {*HEAVY, "submitit"} & set(done.stdout.split())
