"""bf16 under strategies that keep their own copies of the weights: near to one process, and fp32 is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.hardware import cpu_has_bf16
from tests import tiny
from tests.recipes import records, sft_dist, small_recipe

ABLE = cpu_has_bf16() or torch.cuda.is_available()


def run(folder: Path, recipe: Path, strategy: str) -> list[float]:
    words = [f"parallel.strategy={strategy}", f"parallel.processes={1 if strategy == 'single' else 2}"]
    words += ["train.bf16=true", "train.report_to=none", "eval.enabled=false", f"output.output_dir={folder / strategy}"]
    done = sft_dist(folder, "run", str(recipe), *words)
    if not ABLE:
        assert done.returncode == 2
        assert "train.bf16: " in done.stderr
        return []
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [row["loss"] for row in records(folder / strategy)]


def test_losses_are_near_those_of_one_process_and_weights_are_written_in_fp32(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"), records=21)
    expected = run(tmp_path, recipe, "single")
    for strategy in ("zero2", "zero3", "fsdp2"):
        # One rounding is 2^-9 of a value, and where they fall is another matter under each (docs/parity.md).
        assert run(tmp_path, recipe, strategy) == pytest.approx(expected, rel=2e-3)
        if ABLE:
            written = load_file(tmp_path / strategy / "model" / "model.safetensors")
            assert {tensor.dtype for tensor in written.values()} == {torch.float32}
