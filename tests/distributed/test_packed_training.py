"""`data.packing`: proven before the first step, the same losses however it is spread, and unpacked where it leaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.recipes import records, sft_dist, small_recipe

PACKED = ("data.packing=true", "train.max_length=256", "train.num_train_epochs=3")


def run(folder: Path, recipe: Path, *overrides: str) -> str:
    done = sft_dist(folder, "run", str(recipe), *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("architecture", "line"),
    [("llama", "packing exact: positions, "), ("opt", "packing leaks on OPTForCausalLM: positions ")],
)
def test_packed_losses_are_equal_on_one_process_and_on_two(tmp_path: Path, architecture: str, line: str) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model", architecture))
    one, two = tmp_path / "one", tmp_path / "two"
    said = run(tmp_path, recipe, f"output.output_dir={one}", "parallel.processes=1", *PACKED)
    run(tmp_path, recipe, f"output.output_dir={two}", "parallel.processes=2", *PACKED)
    assert f"\n{line}" in said
    assert "\npacked: 45 documents in " in said
    first, second = records(one), records(two)
    assert len(first) >= 6
    for key in ("loss", "grad_norm"):
        worst = max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(first, second, strict=True))
        assert worst < 1e-5, f"{key} differs by {worst:.1e}"
    # Every document once an epoch, and no padding among what is counted.
    summary = json.loads((one / "summary.json").read_text())
    account, packing = summary["data"]["train"], summary["packing"]
    assert packing["capacity"] == 256 and 0.5 < packing["fill"] <= 1
    assert packing["rows"] * 256 * packing["fill"] == pytest.approx(account["tokens"])
    assert first[-1]["num_tokens"] == second[-1]["num_tokens"] == 3 * account["tokens"]
    assert first[-1]["num_trained_tokens"] == 3 * account["trained_tokens"]


def test_a_packed_row_trains_as_its_documents_do_alone(tmp_path: Path) -> None:
    """All documents in one global batch: packed or not, loss, gradient and weights are the same."""
    from safetensors.torch import load_file

    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model", "opt"), records=12)
    common = ("parallel.processes=1", "parallel.global_batch_size=null", "train.max_steps=3", "eval.enabled=false")
    packed, padded = tmp_path / "packed", tmp_path / "padded"
    rows = run(tmp_path, recipe, f"output.output_dir={packed}", "data.packing=true", *common,
               "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=16")  # fmt: skip
    assert "packed: 12 documents in " in rows
    run(tmp_path, recipe, f"output.output_dir={padded}", *common,
        "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")  # fmt: skip
    for a, b in zip(records(packed), records(padded), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["num_trained_tokens"] == b["num_trained_tokens"]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (packed, padded)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)
