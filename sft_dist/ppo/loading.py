"""Loads the models of a PPO run into one module, sharded where the backend shards weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sft_dist import adapters, builtin_models
from sft_dist.config import PeftSection, Recipe
from sft_dist.heads import SCORE, Head, draw_head
from sft_dist.loading import Part, begin, finish
from sft_dist.ppo.actors import POLICY, VALUE, Actors
from sft_dist.ppo.lora import AdapterReward, add_adapter, head_of, own_adapter
from sft_dist.ppo.names import value_source
from sft_dist.ppo.rewards import ModelReward
from sft_dist.stages import Setting
from sft_dist.tensor_files import tensor_files


def load_actors(setting: Setting, rewards: Sequence[ModelReward]) -> Actors:
    """The policy with its value model, the reference, and the reward models. All ranks call it together.

    Raises :class:`UserError`.
    """
    s, recipe = setting, setting.recipe
    frozen = recipe.model_copy(update={"peft": PeftSection()})
    parts: list[Part] = []

    def load(path: str, like: Recipe, head: Head = "causal") -> Any:
        parts.append(begin(builtin_models.resolve(path), like, s.tokenizer, s.backend, s.bf16, s.say, head))
        return parts[-1].model

    policy = load(s.path, recipe)
    value = head = reference = None
    source = value_source(recipe.ppo, s.path, [one.name.source for one in rewards if one.tokenizer is None])
    if recipe.peft.use_peft:
        head = _head(policy, source, recipe, s)
        if recipe.ppo.value_model == "separate":
            parts.append(Part(None, _add_value(policy, source, s)))
    else:
        reference = load(s.path, frozen)
        if recipe.ppo.value_model == "shared":
            head = _head(policy, source, recipe, s)
        else:
            value = load(source, frozen, "reward")
    models: list[Any] = []
    for reward in rewards:
        folder = own_adapter(recipe, reward.name.source, s.path)
        if folder is None:
            models.append(load(reward.name.source, frozen, "reward"))
            # It scores at the last token that is no padding of its own.
            models[-1].config.pad_token_id = reward.pad
            continue
        name = f"reward{reward.number}"
        parts.append(Part(None, add_adapter(policy, name, folder, s.backend, recipe.peft.load_in_4bit)))
        models.append(AdapterReward(name, head_of(folder, getattr(torch, recipe.model.dtype)), reward.pad))
        s.say(f"{reward.name.key}: {reward.name.source} shares the policy's frozen weights")
    _train_alone(policy, recipe)
    actors = Actors(policy, value, head, reference, models, recipe.ppo.temperature)
    finish(actors, parts, recipe, s.backend, s.world, s.bf16, actors.recomputing)
    policy.config.pad_token_id = s.tokenizer.pad_token_id
    return actors


def _add_value(policy: Any, source: str, setting: Setting) -> Callable[[], None]:
    """Give the policy an adapter for the value: a copy of the reward model's, or one of the recipe's shape."""
    peft, folder = setting.recipe.peft, own_adapter(setting.recipe, source, setting.path)
    if folder is not None:
        return add_adapter(policy, VALUE, folder, setting.backend, peft.load_in_4bit)
    one_type = setting.backend.stage == 3 and not peft.load_in_4bit
    policy.add_adapter(VALUE, adapters.lora_config(peft), autocast_adapter_dtype=not one_type)
    return lambda: None


def _train_alone(policy: Any, recipe: Recipe) -> None:
    """Have the adapters of policy and value trained, and nothing else of a LoRA policy."""
    if recipe.peft.use_peft:
        for name, parameter in policy.named_parameters():
            own = "lora_" in name or "modules_to_save" in name
            parameter.requires_grad_(own and any(f".{one}" in name for one in (POLICY, VALUE)))


def _head(policy: Any, source: str, recipe: Recipe, setting: Setting) -> nn.Linear:
    """A value head for the policy's hidden states: that of the reward model where its width is the policy's."""
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    width = base.get_output_embeddings().in_features
    head = nn.Linear(width, 1, bias=False, dtype=getattr(torch, recipe.model.dtype))
    draw_head([("score.weight", head.weight)], recipe.train.seed)
    folder = own_adapter(setting.recipe, source, setting.path)
    files = tensor_files(builtin_models.resolve(source), recipe.model.model_revision)
    name = f"{SCORE}.weight"
    if folder is not None:
        head = head_of(folder, head.weight.dtype)
    elif files is not None and name in files and files.shape(name) == (1, width):
        with torch.no_grad():
            head.weight.copy_(files.rows(name, 0, 1))
        setting.say(f"value: begins with the head of {source}, on the policy's own weights")
    return head
