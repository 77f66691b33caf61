"""One task of a job: what it leaves on record where no worker can be started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.slurm import task
from launch.slurm.records import SlurmDir, Submission, read_ranks, write_submission
from launch.slurm.task import Place, Task
from sft_dist.errors import UserError
from sft_dist.runlock import RunLock
from tests.recipe_texts import MINIMAL

PLACE = Place("7", 0, "127.0.0.1", 20_000, 0, 0, 0, 1, 1, "n0")
ENVIRONMENT = {"SFT_DIST_RENDEZVOUS": "10.0.0.1 20001 2", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3",
               "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "9", "SLURMD_NODENAME": "n1"}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The log would be that of the tests.
    monkeypatch.setattr(task, "log_to", lambda _: None)
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    asked = {"name": "run", "cluster": "c", "nodes": 1, "tasks_per_node": 1, "submitted": "2026-11-25T17:00:00Z"}
    write_submission(SlurmDir(tmp_path), Submission(job_id="7", strategy="single", threads=1, **asked))
    return tmp_path


def code_on_record(root: Path) -> int | None:
    (record,) = read_ranks(SlurmDir(root), "7", 0)
    assert record.ended is not None and record.node == "n0"
    return record.code


def test_a_recipe_that_cannot_be_read_is_on_record_as_the_user_s_to_mend(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "recipe.yaml").write_text("stage: sft\n")
    assert task.run(root, PLACE) == 2 and code_on_record(root) == 2
    assert capsys.readouterr().err.startswith("sft-dist: ")


def test_a_folder_that_another_start_still_holds_is_worth_another_try(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task, "_LOCK_SECONDS", 0.0)
    with RunLock(root, "another"):
        assert task.run(root, PLACE) == 75 and code_on_record(root) == 75
    assert "is in use by" in capsys.readouterr().err


def test_a_submission_that_is_gone_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SlurmDir(root).submission.unlink()
    assert task.run(root, PLACE) == 2
    assert "submission.json: cannot be read; submit the run again with `sft-dist resume`" in capsys.readouterr().err


def test_a_task_knows_its_place_by_slurm_s_variables() -> None:
    assert Place.from_environment(ENVIRONMENT) == Place("9", 2, "10.0.0.1", 20_001, 3, 1, 1, 2, 2, "n1")


def test_ranks_that_are_not_counted_node_by_node_are_refused() -> None:
    with pytest.raises(UserError, match="task 2 is number 1 on node 1: 4 tasks are not dealt out evenly over 2 nodes"):
        Place.from_environment(ENVIRONMENT | {"SLURM_PROCID": "2"})


def test_a_worker_gets_none_of_the_launcher_s_own_variables(root: Path) -> None:
    given = {**os.environ, **ENVIRONMENT, "SUBMITIT_EXECUTOR": "slurm", "OMP_NUM_THREADS": "3"}
    submission = task.read_submission(SlurmDir(root))
    assert submission is not None
    made = task.environment(submission, PLACE, given)
    assert not [name for name in made if name.startswith(("SUBMITIT_", "SFT_DIST_RENDEZVOUS"))]
    assert made["OMP_NUM_THREADS"] == "3" and made["ACCELERATE_MIXED_PRECISION"] == "no"


def test_submitit_can_start_the_task_again(root: Path) -> None:
    again = Task(root).checkpoint()
    assert isinstance(again.function, Task) and again.function.root == str(root)
