"""Packed documents do not see each other: proven on small random models of each architecture, and leaks are found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist import packing_proof
from sft_dist.attention import Way, feed, ways
from sft_dist.data.collate import PackedCollator, PaddingCollator
from sft_dist.packing_proof import prove

SIZE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "max_position_embeddings": 64}  # fmt: skip
GQA: dict[str, Any] = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**SIZE, "intermediate_size": 48},
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 6},
    "qwen2": GQA,
    "gemma": {**GQA, "head_dim": 8},
    "phi": {**SIZE, "intermediate_size": 48},
}


def model_of(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_an_exact_way(name: str, attention: str) -> None:
    proof = prove(model_of(name, attention))
    assert proof.way is not None, proof.line()
    errors = next(trial.errors for trial in proof.trials if trial.way is proof.way)
    assert errors is not None
    assert max(errors.logits, errors.gradients, errors.exchanged) <= 1e-5


def test_opt_leaks_by_positions_and_is_exact_by_a_mask() -> None:
    proof = prove(model_of("opt"))
    first = proof.trials[0].errors
    assert first is not None
    assert first.logits > 1e-2
    assert proof.way is Way.MASK4D
    assert proof.line().startswith("packing leaks on OPTForCausalLM: positions 0.")
    assert "; mask4d exact: " in proof.line()


def test_llama_is_exact_by_positions_and_says_so() -> None:
    assert prove(model_of("llama")).line().startswith("packing exact: positions, ")


@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_the_gradient_of_a_packed_batch_is_that_of_its_documents(name: str) -> None:
    model = model_of(name).eval()
    way = prove(model).way
    assert way is not None
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(96, (n,), generator=generator).tolist()} for n in (9, 3, 14, 1, 20)]
    rows = [row | {"labels": [-100, *row["input_ids"][1:]]} for row in rows]

    def gradients(batch: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad()
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = gradients(feed(PackedCollator(0)([rows[:3], rows[3:]]), way, model.config, model.dtype))
    padded = gradients(PaddingCollator(0)(rows))
    largest = max(gradient.abs().max() for gradient in padded)
    assert max((a - b).abs().max() / largest for a, b in zip(packed, padded, strict=True)) < 1e-5


def test_adapters_and_gradient_checkpointing_are_proven_as_they_run() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("opt"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert prove(model).way is Way.MASK4D
    assert model.training


@pytest.mark.parametrize(("noise", "allowed"), [(1e-7, 1e-5), (4e-5, 4e-4), (0.5, 1e-3), (float("nan"), 1e-5)])
def test_round_off_of_the_model_itself_is_allowed_for_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, noise: float, allowed: float
) -> None:
    """The gradients of a deep model differ by more than 1e-5 for a batch of another shape alone."""
    monkeypatch.setattr(packing_proof, "_compare", lambda *_: (noise, noise))
    limits = packing_proof._limits(model_of("llama"), 1e-5, [[{"input_ids": [1], "labels": [1]}]], None)
    assert (limits.logits, limits.gradients, limits.exchanged) == pytest.approx((allowed, allowed, 1e-6))


def test_a_planted_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(batch: dict[str, Any], way: Way, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        fed = feed(batch, Way.POSITIONS, config, dtype)
        return fed | {"attention_mask": torch.ones_like(fed["input_ids"])}

    monkeypatch.setattr(packing_proof, "feed", leaking)
    proof = prove(model_of("llama"), [Way.POSITIONS, Way.MASK4D])
    assert proof.way is None
    assert proof.line().endswith("no way is exact")


def test_the_proof_leaves_no_trace() -> None:
    model = model_of("gpt2").train()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    state, config = torch.get_rng_state(), model.config.to_dict()
    prove(model, ways(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config.to_dict() == config
    assert [p.grad for p in model.parameters()] == grads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pack_keeps_its_documents_apart() -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    batch = PackedCollator(pad_token_id=1)([rows, rows[:1]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6], [7, 8, 9, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 6], [-100, 8, 9, -100, -100]]
    assert batch["document_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    with pytest.raises(ValueError, match="does not fit into rows of 4"):
        PackedCollator(1, length=4)([rows])
