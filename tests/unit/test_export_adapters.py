"""Adapters merged tensor by tensor are what peft merges in memory, and what the adapted model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sft_dist.errors import UserError
from sft_dist.export.command import Wishes, export
from tests import tiny
from tests.recipes import write_recipe

_IDS = torch.arange(2, 34).reshape(2, 16)
_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def base_model(folder: Path, kind: str) -> Path:
    """A model directory: llama (head of its own), tied, gpt2 (Conv1D)."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=100)
    else:
        config = LlamaConfig(**_SIZE, vocab_size=100, tie_word_embeddings=kind == "tied")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="30KB")
    return folder


def adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter with random values everywhere, none of them small."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """What a model says to a few ids."""
    with torch.no_grad():
        out: torch.Tensor = model.eval()(_IDS).logits
    return out


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "r": 4}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True,
                           "rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 5},
                           "alpha_pattern": {"^model.layers.0.mlp.down_proj": 40}}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "r": 4}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "tied": ("tied", {"target_modules": "all-linear"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    base = base_model(tmp_path / "base", kind)
    made = adapter(tmp_path / "adapter", base, **settings)
    export(str(made), tmp_path / "out", Wishes(file_bytes=20_000))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made)
    adapted = logits(model)
    wanted = model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = ours.state_dict()
    assert state.keys() == wanted.keys()
    worst = max(((state[n] - wanted[n]).abs() / wanted[n].abs().clamp(min=1)).max().item() for n in wanted)
    assert worst < 1e-6, worst
    assert (logits(ours) - adapted).abs().max() < 1e-4 * adapted.abs().max()


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
], ids=["embeddings", "head", "head saved", "embeddings saved"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Model")
def test_a_tied_weight_of_which_one_use_is_trained_becomes_two(tmp_path: Path, settings: dict[str, Any]) -> None:
    """peft's merge would change both uses, or lose one when the model is saved; the adapted model does neither."""
    base = base_model(tmp_path / "base", "tied")
    made = adapter(tmp_path / "adapter", base, **settings)
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made))
    lines: list[str] = []
    export(str(made), tmp_path / "out", Wishes(), lines.append)
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (ours - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert any("are two in the output" in line for line in lines)


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "tied")
    torch.manual_seed(1)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(107)
    model = get_peft_model(grown, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    wanted = logits(model)
    export(str(tmp_path / "adapter"), tmp_path / "out", Wishes())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.vocab_size == 107 and ours.config.tie_word_embeddings
    assert torch.allclose(logits(ours), wanted, atol=1e-6)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
])  # fmt: skip
def test_the_adapter_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = base_model(tmp_path / "base", "llama")
    made = adapter(tmp_path / "adapter", base, **settings)
    export(str(made), tmp_path / "out", Wishes(keep_adapter=True))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (made, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    wanted, ours = (
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f))
        for f in (made, tmp_path / "out")
    )
    assert torch.equal(wanted, ours)


def test_a_merge_into_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")
    made = adapter(tmp_path / "adapter", base, target_modules="all-linear")
    export(str(made), tmp_path / "wide", Wishes())
    export(str(made), tmp_path / "out", Wishes(dtype=torch.bfloat16, base=str(base)))
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "out"))
    assert all(torch.equal(wide[n].bfloat16(), narrow[n]) for n in wide)


@pytest.mark.parametrize(("key", "value"), [
    ("peft_type", "ADALORA"), ("lora_bias", True), ("bias", "all"), ("init_lora_weights", "pissa"),
    ("trainable_token_indices", [3]), ("layer_replication", [[0, 1]]), ("target_parameters", ["x"]),
    ("something_of_next_year", True),
])  # fmt: skip
def test_what_is_not_merged_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    base = base_model(tmp_path / "base", "llama")
    made = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = made / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match="merge") as caught:
        export(str(made), tmp_path / "out", Wishes())
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["tensor", "rank", "base", "other base", "quantised base"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    base = base_model(tmp_path / "base", "llama")
    made = adapter(tmp_path / "adapter", base, target_modules=["q_proj", "k_proj"])
    file, base_option = made / "adapter_model.safetensors", None
    held = load_file(file)
    name = next(n for n in held if "1.self_attn.q_proj.lora_B" in n)
    if damage == "tensor":
        del held[name]
        wanted = "model.layers.1.self_attn.q_proj: lora_B is missing"
    elif damage == "rank":
        held[name] = held[name][:, :3].contiguous()
        wanted = r"q_proj.lora_B has the shape \(32, 3\)"
    elif damage == "base":
        (tmp_path / "base").rename(tmp_path / "moved")
        wanted = "name its folder by --base"
    elif damage == "other base":
        base_option, wanted = str(base_model(tmp_path / "other", "gpt2")), "which .* has not"
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
        wanted = "its weights are quantised"
    save_file(held, file)
    with pytest.raises(UserError, match=wanted) as caught:
        export(str(made), tmp_path / "out", Wishes(base=base_option))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_adapter_over_4_bit_weights_says_what_it_is_merged_onto(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    adapter(tmp_path / "run" / "model", base, target_modules=["q_proj"])
    write_recipe(
        tmp_path / "run" / "recipe.yaml",
        model={"model_name_or_path": str(base)},
        data={"dataset_name": "python-docs"},
        peft={"use_peft": True, "load_in_4bit": True},
        output={"output_dir": str(tmp_path / "run")},
    )
    lines: list[str] = []
    export(str(tmp_path / "run"), tmp_path / "out", Wishes(), lines.append)
    assert lines[0] == f"the adapter was trained over 4-bit weights and is merged onto the unquantised {base}"
    # The tokens that end an answer of the trained template end generation, too.
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]
