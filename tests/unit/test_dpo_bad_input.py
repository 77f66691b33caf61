"""Settings and references of DPO that cannot be: one line each, before a GPU is taken."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from launch.check_reference import reference
from launch.fit import state_bytes
from sft_dist.dpo.reference import refuse_other_model
from sft_dist.errors import UserError
from sft_dist.models import load_config
from tests import tiny
from tests.recipe_texts import MINIMAL, faults, load

DPO = f"stage: dpo\n{MINIMAL}"


@pytest.mark.parametrize(
    ("key", "said", "settings"),
    [
        ("dpo.loss_weights", "2 for the 1 of dpo.loss_type (sigmoid); give one for each", ["dpo.loss_weights=[1, 2]"]),
        ("dpo.loss_type", "ipo stands there twice", ["dpo.loss_type=[ipo, ipo]"]),
        ("dpo.label_smoothing", "has no effect on sigmoid, sft; take robust", ["dpo.loss_type=[sigmoid, sft]",
                                                                              "dpo.label_smoothing=0.1"]),
        ("dpo.label_smoothing", "robust needs less than 0.5, got 0.5", ["dpo.loss_type=robust",
                                                                        "dpo.label_smoothing=0.5"]),
        ("dpo.label_smoothing", "exo_pair needs more than 0", ["dpo.loss_type=exo_pair"]),
        ("dpo.discopop_tau", "has no effect without discopop", ["dpo.discopop_tau=0.1"]),
        ("dpo.f_divergence_type", "forward_kl is no divergence for apo_zero", ["dpo.loss_type=apo_zero",
                                                                              "dpo.f_divergence_type=forward_kl"]),
        ("dpo.f_alpha_divergence_coef", "has no effect with reverse_kl", ["dpo.f_alpha_divergence_coef=0.2"]),
        ("dpo.use_weighting", "aot sorts the pairs", ["dpo.loss_type=aot", "dpo.use_weighting=true"]),
        ("dpo.use_weighting", "sft is a mean over tokens", ["dpo.loss_type=[sigmoid, sft]", "dpo.use_weighting=true"]),
        ("dpo.precompute_ref_batch_size", "has no effect while dpo.precompute", ["dpo.precompute_ref_batch_size=4"]),
        ("dpo.precompute_ref_log_probs", "cannot stand with data.streaming", [
            "dpo.precompute_ref_log_probs=true", "data.streaming=true", "train.max_steps=5"]),
        ("dpo.ref_model", "the reference is the model with its adapter off", ["dpo.ref_model=m", "peft.use_peft=true"]),
        ("dpo.ref_model_revision", "has no effect without dpo.ref_model", ["dpo.ref_model_revision=v1"]),
        ("peft.lora_target_modules", "lm_head is read past an adapter", ["peft.use_peft=true",
                                                                        "peft.lora_target_modules=[lm_head]"]),
        ("parallel.offload_nvme_path", "DeepSpeed keeps one model there", [
            "parallel.strategy=zero3_offload", "parallel.offload_nvme_path=/tmp"]),
        ("dpo.beta", "0", ["dpo.beta=0"]),
        ("dpo.loss_type", "kto", ["dpo.loss_type=kto"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_stand_together(key: str, said: str, settings: list[str]) -> None:
    found = [line for line in faults(DPO, *settings) if f" {key}" in line]
    assert found and all(said in line for line in found), found


def test_one_loss_is_a_list_of_it() -> None:
    assert load(DPO, "dpo.loss_type=hinge").dpo.loss_type == ["hinge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reference that fits, and three that do not: of another kind, size or tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("policy", "fits", "words", "larger"):
        tiny.save_model(folder / name, "llama", layers=1)
    tiny.save_model(folder / "opt", "opt", layers=1)
    file = folder / "words" / "tokenizer.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(held))
    file = folder / "larger" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 4096}))
    return folder


REFUSED = [
    ("opt", "its architecture is OPTForCausalLM, that of"),
    ("words", "its tokenizer has another vocabulary than that of"),
    ("larger", "its vocabulary has 4,096 tokens, that of"),
    ("none", ""),
]


@pytest.mark.parametrize(("name", "said"), REFUSED)
def test_a_reference_that_the_policy_cannot_be_compared_with(folder: Path, name: str, said: str) -> None:
    """By the check, and by the worker, which knows of every kind of tokenizer."""
    recipe = load(DPO, f"model.model_name_or_path={folder / 'policy'}", f"dpo.ref_model={folder / name}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    config = load_config(str(folder / "policy"), recipe.model)
    setting = cast(Any, SimpleNamespace(recipe=recipe, tokenizer=tokenizer, config=config))
    for look in (lambda: list(reference(recipe)), lambda: refuse_other_model(setting)):
        with pytest.raises(UserError) as caught:
            look()
        assert str(caught.value).startswith(f"dpo.ref_model: {folder / name}: {said}" if said else "dpo.ref_model: ")
        assert "\n" not in str(caught.value)


def test_a_reference_that_fits_is_said_to(folder: Path) -> None:
    recipe = load(DPO, f"model.model_name_or_path={folder / 'policy'}", f"dpo.ref_model={folder / 'fits'}")
    ((well, line),) = reference(recipe)
    assert well and line.startswith(f"dpo.ref_model: {folder / 'fits'} has the architecture of")
    assert not list(reference(load(DPO)))


def test_auto_counts_the_reference() -> None:
    """16 bytes a weight of the policy, and 4 of the reference, unless there is none beside it."""
    assert state_bytes(load(DPO), 1000, "ddp", 4) == 20_000
    assert state_bytes(load(DPO), 1000, "fsdp2", 4) == 20_000 / 4
    assert state_bytes(load(DPO, "dpo.precompute_ref_log_probs=true"), 1000, "ddp", 4) == 16_000
    assert state_bytes(load(DPO, "peft.use_peft=true"), 1000, "ddp", 4) == 4_000
