"""What both sides of tests.benchmarks.ppo_against_trl train: models, prompts and settings."""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_dist import builtin_models
from tests import letters
from tests.benchmarks import ppo_reward

# Each is a token of the small models.
CHARACTERS = string.ascii_lowercase
_WORDS = "the quick brown fox jumps over a lazy dog and returns a list of strings".split()  # noqa: SIM905
_LONGEST = 100


@dataclass(frozen=True)
class Case:
    """A training, under the names of TRL's PPOConfig.

    There are `prompts` of them, whose lengths, in letters or words, are log-normal around the median `length`;
    `spread` is the deviation of the logarithm. `last`: the rollouts whose mean reward counts. `micro_batch`: of this
    project, which puts like lengths together; TRL's is a whole mini-batch. Both generate a rollout at once.
    """

    model: str
    rollouts: int
    last: int
    rollout_batch_size: int
    response_length: int
    num_ppo_epochs: int
    learning_rate: float
    micro_batch: int
    packing: bool = True
    length: int = 16
    spread: float = 0.8
    num_mini_batches: int = 4
    kl_coef: float = 0.01
    missing_eos_penalty: float | None = None
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    prompts: int = 512


def _small(model: str, **more: Any) -> Case:
    return Case(model, rollouts=40, last=5, rollout_batch_size=32, response_length=ppo_reward.LETTERS,
                num_ppo_epochs=4, learning_rate=1e-3, micro_batch=8, **more)  # fmt: skip


CASES = {
    "llama": _small("llama"),
    "opt": _small("opt"),
    "llama, prompts of one length": _small("llama", spread=0.0),
    builtin_models.NAME: Case(builtin_models.NAME, rollouts=3, last=1, rollout_batch_size=8, response_length=53,
                              num_ppo_epochs=2, num_mini_batches=2, learning_rate=1e-5, micro_batch=4),
}  # fmt: skip


def save_models(folder: Path, model: str) -> None:
    """The policy in `folder/model`; the value model, of the same weights and a head of its own, in `folder/value`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    if builtin_models.is_built_in(model):
        source = builtin_models.resolve(model)
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        # Its own is the one that ends a turn, which TRL would mask in the prompts.
        tokenizer.pad_token = "<|endoftext|>"
    else:
        tokenizer = letters.tokenizer(CHARACTERS)
        policy = AutoModelForCausalLM.from_config(_config(model, tokenizer))
    policy.config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder / "model")
    value = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    value.save_pretrained(folder / "value")
    tokenizer.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "value")


def _config(model: str, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, OPTConfig

    size = letters.sizes(tokenizer) | {"hidden_size": 64, "max_position_embeddings": 256}
    if model == "opt":
        return OPTConfig(**size, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0)
    return LlamaConfig(**size, intermediate_size=256, num_key_value_heads=2)


def prompts(case: Case) -> list[str]:
    """The texts of the prompts, the same for every seed of the training."""
    draw = random.Random(0)
    lengths = [round(case.length * draw.lognormvariate(0, case.spread)) for _ in range(case.prompts)]
    parts, between = (_WORDS, " ") if builtin_models.is_built_in(case.model) else (list(CHARACTERS), "")
    return [between.join(draw.choices(parts, k=min(max(length, 1), _LONGEST))) for length in lengths]


def trl_settings(case: Case, folder: Path, seed: int) -> dict[str, Any]:
    """For ppo_trl_side.py, with the prompts in this project's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turns = [[{"role": "user", "content": text}] for text in prompts(case)]
    ids = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in turns]
    return asdict(case) | {"folder": str(folder), "seed": seed, "prompts": ids}


def our_recipe(case: Case, folder: Path, seed: int, run: Path) -> dict[str, Any]:
    """The same for this project."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(case)), encoding="utf-8")
    names = ("rollout_batch_size", "num_mini_batches", "num_ppo_epochs", "response_length", "temperature", "kl_coef",
             "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "missing_eos_penalty")  # fmt: skip
    mini_batch = case.rollout_batch_size // case.num_mini_batches
    return {
        "stage": "ppo",
        "model": {"model_name_or_path": str(folder / "model")},
        "data": {"dataset_name": str(data), "packing": "required" if case.packing else False},
        "ppo": {name: getattr(case, name) for name in names}
        | {
            "reward": "tests.benchmarks.ppo_reward:reward",
            "value_model_name_or_path": str(folder / "value"),
            "rollout_micro_batch_size": case.rollout_batch_size,
        },
        "train": {
            "max_length": 256,
            "per_device_train_batch_size": case.micro_batch,
            "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_steps": case.rollouts * case.num_ppo_epochs * case.num_mini_batches,
            "logging_steps": case.num_ppo_epochs * case.num_mini_batches,
            "seed": seed,
            "report_to": "none",
            "save_strategy": "no",
        },
        "parallel": {"global_batch_size": mini_batch},
        "output": {"output_dir": str(run), "overwrite": True},
        "eval": {"enabled": False},
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
