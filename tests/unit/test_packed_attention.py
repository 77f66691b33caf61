"""Packed documents do not see each other: proven on small random models of each architecture, and leaks are found."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sft_dist import packing_proof
from sft_dist.attention import Way, feed, ways
from sft_dist.data.collate import PackedCollator, PaddingCollator
from sft_dist.packing_proof import Proof, prove
from tests.architectures import (
    FLEX,
    MODELS,
    PAIRS,
    SDPA,
    UNPACKED,
    flex_on_a_processor,
    model_of,
    with_flash_on_a_processor,
)


class Convolution(PreTrainedModel):
    """A user's model: each token mixed with the one before it, whatever the document."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(96, 8)
        self.head = torch.nn.Linear(8, 96)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        return CausalLMOutput(logits=self.head(hidden + hidden.roll(1, dims=1)))


def tried(name: str, attention: str, candidates: Sequence[Way] | None = None) -> Proof:
    with flex_on_a_processor() if attention == "flex_attention" else nullcontext():
        return prove(model_of(name, attention), candidates)


def largest(proof: Proof, way: Way) -> float:
    errors = next(trial.errors for trial in proof.trials if trial.way is way)
    assert errors is not None
    return max(errors.logits, errors.gradients, errors.exchanged)


@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_every_architecture_has_an_exact_way(name: str, attention: str) -> None:
    proof = tried(name, attention)
    assert proof.way is not None, proof.line()
    assert largest(proof, proof.way) <= 1e-5


@pytest.mark.parametrize("name", FLEX)
def test_block_masks_of_flex_attention_are_exact(name: str) -> None:
    assert largest(tried(name, "flex_attention", [Way.FLEX]), Way.FLEX) <= 1e-5


@pytest.mark.parametrize("name", SDPA)
def test_rows_joined_for_flash_attention_are_exact(name: str) -> None:
    proof = prove(with_flash_on_a_processor(model_of(name)))
    assert proof.way is Way.VARLEN, proof.line()
    assert largest(proof, Way.VARLEN) <= 1e-5


def test_rows_that_are_not_joined_leak_where_attention_reads_no_positions() -> None:
    assert prove(with_flash_on_a_processor(model_of("llama")), [Way.POSITIONS]).way is None


def test_joined_rows_tell_where_documents_end() -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in ([7, 8, 9], [5], [6, 4])]
    fed = feed(PackedCollator(0)([rows, rows[:1]]), Way.VARLEN, model_of("llama").config, torch.float32)
    assert fed["input_ids"].tolist() == [[7, 8, 9, 5, 6, 4, 7, 8, 9]]
    assert fed["labels"].tolist() == [[-100, 8, 9, -100, -100, 4, -100, 8, 9]]
    assert fed["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2]]
    assert fed["cu_seq_lens_q"].tolist() == fed["cu_seq_lens_k"].tolist() == [0, 3, 4, 6, 9]
    assert fed["max_length_q"] == fed["max_length_k"] == 3
    assert fed["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 3, 3, 3]]
    assert "attention_mask" not in fed


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, with which torch compiles")
def test_compiled_flex_attention_reads_the_block_mask() -> None:
    """On a CPU forward only, which is all that torch has there; `tests/gpu` has the backward."""
    model = model_of("opt", "flex_attention").eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(96, (3, 70), generator=generator)
    batch = PackedCollator(0)([[{"input_ids": row, "labels": row} for row in ids.tolist()]])
    with torch.no_grad():
        packed = model(**feed(batch, Way.FLEX, model.config, model.dtype)).logits[0]
        alone = model(input_ids=ids).logits.flatten(0, 1)
    assert (packed - alone).abs().max() / alone.abs().max() <= 1e-5


@pytest.mark.parametrize("name", UNPACKED)
def test_what_cannot_be_packed_exactly_is_told_in_a_line(name: str) -> None:
    proof = prove(model_of(name, "eager"))
    assert proof.way is None
    assert proof.line().startswith(f"packing leaks on {type(model_of(name, 'eager')).__name__}: positions ")
    assert proof.line().endswith("no way is exact")
    assert "\n" not in proof.line()


def test_a_forward_that_takes_neither_positions_nor_masks_is_told_in_a_line() -> None:
    proof = prove(Convolution(PreTrainedConfig(vocab_size=96)))
    assert proof.way is None
    assert proof.line().startswith("packing fails on Convolution: positions not possible (TypeError: ")


def test_attention_that_has_no_backward_is_told_in_a_line() -> None:
    proof = prove(model_of("llama", "flex_attention"))
    assert proof.way is None
    assert "positions not possible (NotImplementedError: FlexAttention does not support backward on CPU" in proof.line()


def test_no_document_is_longer_than_the_model_has_positions() -> None:
    config = AutoConfig.for_model("opt", **MODELS["opt"] | {"max_position_embeddings": 20})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention")
    with flex_on_a_processor():
        assert prove(model).way is Way.FLEX


@pytest.mark.parametrize(("attention", "times"), [("sdpa", 0), ("flex_attention", 1)])
def test_what_torch_compiled_for_the_proof_does_not_count(
    attention: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(True))
    tried("llama", attention)
    assert len(calls) == times


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
