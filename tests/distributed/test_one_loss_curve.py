"""One recipe, one loss curve: one process, two, `accelerate launch` with DDP and with ZeRO-2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.recipes import ROOT, command, records, sft_dist, small_recipe

TOLERANCE = 1e-5


def accelerate(folder: Path, strategy: str, recipe: Path, *overrides: str) -> None:
    done = command(
        folder, sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "ds_configs" / f"{strategy}.yaml"), "--num_processes", "2", "--main_process_port", "0",
        "-m", "sft_dist", str(recipe), *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run(folder: Path, recipe: Path, *overrides: str) -> None:
    done = sft_dist(folder, "run", str(recipe), *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between weights, relative to the root mean square of their tensor's entries."""
    return max(
        ((found[name] - weight).abs().max() / weight.pow(2).mean().sqrt().clamp(min=1e-3)).item()
        for name, weight in expected.items()
    )


def test_losses_and_weights_are_equal_however_the_run_is_spread(tmp_path: Path) -> None:
    # No tiny epsilon, which lets round-off grow (docs/parity.md).
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model", "llama"))
    smooth = "train.adam_epsilon=1e-4"
    out = {name: tmp_path / name for name in ("one", "two", "ddp", "zero2")}
    where = {name: f"output.output_dir={folder}" for name, folder in out.items()}
    run(tmp_path, recipe, where["one"], "parallel.processes=1", "train.per_device_train_batch_size=4", smooth)
    run(tmp_path, recipe, where["two"], "parallel.processes=2", smooth)
    accelerate(tmp_path, "ddp", recipe, where["ddp"], smooth)
    accelerate(tmp_path, "zero2", recipe, where["zero2"], smooth)
    reference = records(out["one"])
    # 45 rows in global batches of 4: twelve steps an epoch, the last of one row.
    assert len(reference) == 24
    held_out = [json.loads((out[name] / "eval" / "before.json").read_text())["measure"] for name in ("one", "two")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    for name in ("two", "ddp", "zero2"):
        found = records(out[name])
        for key in ("loss", "grad_norm"):
            expected = torch.tensor([row[key] for row in reference], dtype=torch.float64)
            actual = torch.tensor([row[key] for row in found], dtype=torch.float64)
            worst = ((actual - expected).abs() / expected).max().item()
            assert worst < TOLERANCE, f"{name}: {key} differs by {worst:.1e}"
        assert [row["num_trained_tokens"] for row in found] == [row["num_trained_tokens"] for row in reference]
        assert distance(weights(out[name]), weights(out["one"])) < TOLERANCE, name


def test_the_held_out_loss_is_a_mean_over_tokens(tmp_path: Path) -> None:
    """Seven rows over two processes and batches of two: no row counts twice, no short row counts more."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from sft_dist.data.collate import PaddingCollator
    from sft_dist.evaluation.perplexity import measure_rows

    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    lengths = [3, 40, 5, 7, 31, 4, 11]
    rows = Dataset.from_list(
        [{"input_ids": list(range(5, 5 + n)), "labels": [-100, -100, *range(7, 5 + n)]} for n in lengths]
    )
    total = tokens = 0.0
    for row in rows:
        batch = PaddingCollator(0)([row])
        out = model(**batch)
        count = len(row["labels"]) - 2
        total, tokens = total + out.loss.item() * count, tokens + count
    found = measure_rows(model, rows, 0, 2, "cpu")
    assert found.tokens == tokens
    assert found.records == len(lengths)
    assert found.loss == pytest.approx(total / tokens, rel=1e-6)
