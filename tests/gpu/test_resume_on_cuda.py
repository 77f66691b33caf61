"""Going on from a checkpoint on CUDA, to the bit. Skipped aloud without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.environment import STRATEGIES
from sft_dist.backend import NODE_SHARDS
from tests import tiny
from tests.distributed.test_resume import CUT, job
from tests.outcome import numbers, weights_hash
from tests.ranks import do_runs
from tests.recipes import small_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
GPUS = torch.cuda.device_count()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path, strategy: str) -> None:
    if GPUS == 1 and strategy in NODE_SHARDS:
        pytest.skip("needs several GPUs")
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    processes = 1 if strategy == "single" else GPUS
    words = ("peft.use_peft=true", "peft.lora_dropout=0.2", "train.bf16=true", f"parallel.global_batch_size={2 * GPUS}")
    whole, again = tmp_path / "whole", tmp_path / "again"
    do_runs(
        tmp_path,
        strategy,
        processes,
        [job(recipe, whole, *words), job(recipe, again, *words, "output.resume=true", f"cut:{whole}:{CUT}")],
    )
    assert numbers(whole) == numbers(again)
    assert weights_hash(whole) == weights_hash(again)
