"""The road on CUDA: bf16, sdpa and flash attention, one GPU and as many as there are. Skipped aloud without one."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.environment import STRATEGIES
from sft_dist.backend import NODE_SHARDS
from sft_dist.hardware import peak_flops
from tests import tiny
from tests.recipes import records, sft_dist, small_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
GPUS = torch.cuda.device_count()


def trained(folder: Path, architecture: str, *overrides: str) -> Path:
    """The folder of a finished run in bf16."""
    recipe = small_recipe(folder, tiny.save_model(folder / "base", architecture, layers=4))
    done = sft_dist(folder, "run", str(recipe), "train.bf16=true", "train.report_to=none", *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in records(run)]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_bf16_trains_measures_and_saves_a_model_that_loads(tmp_path: Path, architecture: str, attention: str) -> None:
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash-attn, which is not installed")
    run = trained(tmp_path, architecture, "parallel.processes=1", f"model.attn_implementation={attention}")
    assert losses(run)[-1] < losses(run)[0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    AutoModelForCausalLM.from_pretrained(run / "model")
    last = records(run)[-1]
    assert last["peak_memory_gb"] > 0
    assert ("mfu" in last) == (peak_flops(torch.cuda.get_device_name()) is not None)


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "single"])
def test_all_gpus_give_the_losses_of_one(tmp_path: Path, strategy: str) -> None:
    if strategy in NODE_SHARDS and GPUS == 1:
        pytest.skip("needs several GPUs")
    spread = ["train.bf16=false", f"parallel.global_batch_size={2 * GPUS}"]
    alone = trained(tmp_path / "alone", "llama", "parallel.processes=1", *spread)
    every = trained(tmp_path / "every", "llama", f"parallel.processes={GPUS}", f"parallel.strategy={strategy}", *spread)
    assert losses(every) == pytest.approx(losses(alone), rel=1e-5)


def test_fp32_on_the_gpu_gives_the_losses_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = ["train.bf16=false", "parallel.processes=1"]
    gpu = losses(trained(tmp_path / "gpu", "llama", *spread))
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    cpu = losses(trained(tmp_path / "cpu", "llama", *spread))
    # Two implementations of every kernel, each within fp32's rounding.
    assert gpu == pytest.approx(cpu, rel=1e-4)


def test_lora_with_gradient_checkpointing(tmp_path: Path) -> None:
    run = trained(tmp_path, "llama", "peft.use_peft=true", "train.learning_rate=0.01", "parallel.processes=1")
    assert losses(run)[-1] < losses(run)[0]
    assert (run / "model" / "adapter_model.safetensors").exists()


def test_no_strategy_changes_a_number_on_the_gpus(tmp_path: Path) -> None:
    done = sft_dist(tmp_path, "verify", "--shape", "llama", limit=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
