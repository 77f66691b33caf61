"""What a start that was killed left in the run's folder is cleaned away by the next one."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.recipes import sft_dist, small_recipe


def test_a_half_written_model_and_marks_of_a_killed_start_are_cleaned_away(tmp_path: Path) -> None:
    """Files of weights have other names under another strategy: what is left would end up beside the new ones."""
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"), records=8)
    half, mark = (tmp_path / "run" / name for name in ("model.unfinished", "checkpoints/.seen-0123-0"))
    for file in (half / "model-00001-of-00009.safetensors", mark):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    done = sft_dist(tmp_path, "run", str(recipe), "train.report_to=none", "eval.enabled=false", "parallel.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in (tmp_path / "run" / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert not half.exists() and not mark.exists()
