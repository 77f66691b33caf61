"""What vLLM is given of a policy, and what is made of what it gives back. vLLM itself is not here."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft_dist.errors import UserError
from sft_dist.ppo.vllm import VLLM, merged_weights
from tests import tiny


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.add_adapter("value", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_an_adapter_is_added_to_copies_of_the_weights(policy: Any) -> None:
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    given = dict(merged_weights(policy))
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    policy.delete_adapter("value")
    merged = dict(policy.merge_and_unload().named_parameters())
    assert given.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(given[name], weight, rtol=1e-6, atol=1e-6)


def test_a_whole_model_is_given_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    given = dict(merged_weights(model))
    assert given.keys() == dict(model.named_parameters()).keys()


def test_each_prompt_has_a_seed_and_a_response_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def generate(prompts: Any, sampling_params: Any, use_tqdm: bool) -> Any:
        asked.update(prompts=prompts, settings=sampling_params)
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=(7, 2, 9))]) for _ in prompts]

    fake = types.ModuleType("vllm")
    fake.SamplingParams = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = object.__new__(VLLM)
    engine._engine = types.SimpleNamespace(llm=types.SimpleNamespace(generate=generate))
    calls: list[int] = []
    numbers = torch.tensor([[0.25, 0.0], [0.5, 0.0]], dtype=torch.float64)
    found = engine.respond(None, [[1], [1, 3]], numbers, 3, 0.7, [2], 0, lambda: calls.append(1))
    assert found == [[7, 2], [7, 2]] and calls == [1]
    assert asked["prompts"] == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [1, 3]}]
    assert [one["seed"] for one in asked["settings"]] == [2**29, 2**30]
    assert {(one["temperature"], one["max_tokens"], tuple(one["stop_token_ids"])) for one in asked["settings"]} == {
        (0.7, 3, (2,))
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"ppo\.generator: vllm needs a GPU, and there is none; take transformers"):
        VLLM(None, None, None, None)  # type: ignore[arg-type]
