"""The folder of a run: claimed once, complete files, nothing of the user's removed, no secret kept."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from sft_dist.config import OutputSection, Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from sft_dist.rundir import claim, clear, environment, occupied, settings, without_secrets, write_text


def recipe_into(folder: Path, **output: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "output": {"output_dir": str(folder), **output},
        }
    )


def test_claiming_writes_what_repeats_the_run(tmp_path: Path) -> None:
    recipe = recipe_into(tmp_path / "run")
    run = claim(recipe, ["sft-dist", "run", "r.yaml", "train.seed=1"])
    assert load_recipe(run.recipe) == recipe
    held = json.loads((run.root / "environment.json").read_text())
    assert held["command"] == ["sft-dist", "run", "r.yaml", "train.seed=1"]
    assert {"torch", "transformers", "trl", "accelerate", "peft", "datasets"} <= set(held["versions"])
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.recipe.stat().st_mode) == 0o600


def test_a_second_run_is_refused_unless_told_to_overwrite_or_resume(tmp_path: Path) -> None:
    claim(recipe_into(tmp_path), [])
    with pytest.raises(UserError, match=r"holds another run; set output\.resume=true to go on"):
        claim(recipe_into(tmp_path), [])
    claim(recipe_into(tmp_path, resume=True), [])
    claim(recipe_into(tmp_path, overwrite=True), [])


def test_overwriting_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    run = claim(recipe_into(tmp_path), [])
    (run.model).mkdir()
    (run.model / "weights").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (tmp_path / "wandb").symlink_to(outside)
    clear(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt"}
    assert (outside / "kept").read_text() == "mine"


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    said = occupied(OutputSection(output_dir=str(tmp_path), resume=True))
    assert said == f"output.resume: {tmp_path} holds no run to go on with; leave it out, or mend output.output_dir"
    assert occupied(OutputSection(output_dir=str(tmp_path / "new"))) is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output\.output_dir: .*file/run cannot be written: Not a directory"):
        claim(recipe_into(tmp_path / "file" / "run"), [])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_no_secret_is_kept_with_a_run() -> None:
    variables = {"WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO"}
    assert settings(variables) == {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO"}
    assert without_secrets(["run", "WANDB_API_KEY=s3cret", "train.seed=1"]) == [
        "run",
        "WANDB_API_KEY=***",
        "train.seed=1",
    ]
    assert "s3cret" not in json.dumps(environment(["run", "hf.token=s3cret"]))
