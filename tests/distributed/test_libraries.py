"""What is worked round in libraries is still so. A test that fails here says that a workaround can go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks, tiny

WORKER = Path(__file__).parent / "workers" / "libraries.py"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("libraries")
    return ranks.told(folder, "fsdp2", 2, str(WORKER), str(folder))[0]


@needs_no_gpu
def test_accelerate_makes_ddp_of_fsdp_on_a_cpu(told: dict[str, Any]) -> None:
    assert told["kind"] == "MULTI_CPU", "accelerate knows FSDP on a CPU now: announce_to_accelerate() can go"


def test_recomputation_inside_of_fsdp2_s_hooks_gathers_nothing_twice(told: dict[str, Any]) -> None:
    """Two layers in each direction, and once what is around them: as often as without recomputation."""
    assert told["gathers"] == told["gathers_kept"] == 2 * 2 + 1
    assert told["gathers_outside"] >= told["gathers"]


@needs_no_gpu
def test_an_evaluation_changes_weights_in_4_bits_unless_they_are_kept(tmp_path: Path) -> None:
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from sft_dist.adapters import keep_quantised

    folder = tiny.save_model(tmp_path / "model")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    ids = torch.arange(5, 25)[None]

    def losses(keep: bool) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
        if keep:
            keep_quantised(model)
        found = []
        for training in (True, False, True):
            model.train(training)
            with torch.no_grad():
                found.append(model(input_ids=ids, labels=ids).loss.item())
        return found

    before, _, after = losses(keep=False)
    # It packs them anew on processors with AVX-512 bf16 only.
    assert (before != after) == has_avx512bf16(), "bitsandbytes leaves weights as they are now: keep_quantised() can go"
    before, during, after = losses(keep=True)
    assert before == during == after
