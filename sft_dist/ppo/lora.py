"""Adapters that share the policy's frozen weights: the value's, and those of reward models trained on them."""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sft_dist import builtin_models
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.heads import SCORE, put_values

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEAD = f"base_model.model.{SCORE}.weight"


class AdapterReward(nn.Module):
    """A reward model that is an adapter of the policy's weights, by its name there, and a head. `pad`: its token."""

    def __init__(self, adapter: str, head: nn.Linear, pad: int) -> None:
        super().__init__()
        self.adapter, self.head, self.pad = adapter, head, pad


def own_adapter(recipe: Recipe, source: str, policy: str) -> Path | None:
    """The folder of a reward model that is an adapter of the frozen weights of a LoRA policy, or None.

    `policy`: the folder of those weights.
    """
    path = Path(builtin_models.resolve(source))
    if not (recipe.peft.use_peft and (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file()):
        return None
    held = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    base = builtin_models.resolve(str(held.get("base_model_name_or_path")))
    same = os.path.realpath(base) == os.path.realpath(policy) if Path(base).exists() else base == policy
    return path if same and held.get("task_type") == "SEQ_CLS" else None


def add_adapter(
    policy: Any, name: str, folder: Path, backend: Backend, quantised: bool
) -> Callable[[], None]:  # fmt: skip
    """Give the policy the adapter of a folder under a name. Returns what fills it, once the policy is sharded."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    # The head is kept beside the policy, and nothing is drawn.
    config.task_type, config.modules_to_save, config.lora_dropout, config.inference_mode = "CAUSAL_LM", None, 0.0, False
    policy.add_adapter(name, config, autocast_adapter_dtype=backend.stage != 3 or quantised)

    def fill() -> None:
        values = load_file(folder / _WEIGHTS)
        for key, parameter in policy.named_parameters():
            if f".{name}." in key:
                put_values(parameter, values[key.replace(f".{name}.", ".")])

    return fill


def head_of(folder: Path, dtype: torch.dtype) -> nn.Linear:
    """The head of a reward model that was trained as an adapter."""
    weight = load_file(folder / _WEIGHTS)[_HEAD]
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head
