"""The size of a model by its configuration, and the strategy that `auto` takes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, OPTConfig

from launch.devices import Gpu
from launch.fit import config_of, fitting, state_bytes
from sft_dist.config import Recipe
from sft_dist.modelinfo import count_parameters, quantization_fault

H100 = Gpu(0, "H100", (9, 0), 80 * 2**30)
LLAMA_7B = LlamaConfig().to_dict()
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
).to_dict()
OPT_1B = OPTConfig(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32).to_dict()


def recipe(**sections: dict[str, Any]) -> Recipe:
    least = {
        "model": {"model_name_or_path": "m"},
        "data": {"dataset_name": "d"},
        "output": {"output_dir": "o"},
    }
    return Recipe.model_validate({**least, **{k: least.get(k, {}) | v for k, v in sections.items()}})


@pytest.mark.parametrize("kind", [OPTConfig, LlamaConfig, MistralConfig, GPT2Config, MixtralConfig])
def test_the_count_of_weights_is_that_of_the_model_within_a_percent(kind: Any) -> None:
    config = kind()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = count_parameters(config.to_dict())
    assert counted == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_what_has_other_names_is_not_counted() -> None:
    assert count_parameters({"d_model": 4}) is None


@pytest.mark.parametrize(
    ("config", "sections", "processes", "strategy"),
    [
        (OPT_1B, {}, 8, "ddp"),
        (LLAMA_7B, {}, 8, "zero2"),
        (LLAMA_7B, {"peft": {"use_peft": True}}, 8, "ddp"),
        (LLAMA_70B, {}, 64, "fsdp2"),
        (LLAMA_70B, {}, 8, "zero3_offload"),
        (LLAMA_70B, {"peft": {"use_peft": True, "load_in_4bit": True}}, 8, "ddp"),
    ],
)
def test_auto_shards_no_more_than_it_has_to(
    config: dict[str, Any], sections: dict[str, Any], processes: int, strategy: str
) -> None:
    assert fitting(recipe(**sections), config, processes, [H100] * 8) == strategy


@pytest.mark.parametrize("name", ["/none/run/model", "./run/model", "runs/chain/sft/model"])
def test_a_model_that_is_yet_to_be_made_is_not_known(name: str) -> None:
    assert config_of(recipe(model={"model_name_or_path": name})) is None


def test_auto_is_ddp_where_nothing_is_known() -> None:
    assert fitting(recipe(), None, 8, [H100]) == "ddp"
    assert fitting(recipe(), LLAMA_70B, 8, []) == "ddp"


def test_model_states_are_those_of_the_zero_paper() -> None:
    """fp32 with Adam: 16 bytes a weight, of which ZeRO-2 shards gradients and moments, ZeRO-3 all."""
    bytes_of = {s: state_bytes(recipe(), 1000, s, 4) for s in ("ddp", "zero2", "fsdp2")}
    assert bytes_of == {"ddp": 16_000, "zero2": 4_000 + 12_000 / 4, "fsdp2": 16_000 / 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MixtralConfig().to_dict(), "its experts are no linear layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq already"),
    ],
)
def test_models_that_bitsandbytes_cannot_take_are_told(config: dict[str, Any], said: str) -> None:
    assert said in (quantization_fault(config) or "")
    assert quantization_fault(LLAMA_7B) is None
