"""Loads the models of a PPO run into one module, sharded where the backend shards weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sft_dist import adapters, builtin_models
from sft_dist.config import PeftSection, Recipe
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.heads import SCORE, draw_head
from sft_dist.loading import Part, begin, finish
from sft_dist.modelinfo import max_positions
from sft_dist.models import load_config
from sft_dist.ppo.actors import VALUE, Actors
from sft_dist.ppo.names import RewardName, reward_names, value_source
from sft_dist.ppo.rewards import ModelReward, tokenizer_fault
from sft_dist.stages import Setting
from sft_dist.tensor_files import tensor_files


def load_actors(setting: Setting, rewards: Sequence[ModelReward]) -> Actors:
    """The policy with its value model, the reference, and the reward models. All ranks call it together.

    Raises :class:`UserError`.
    """
    s, recipe = setting, setting.recipe
    frozen = recipe.model_copy(update={"peft": PeftSection()})
    parts: list[Part] = []

    def load(path: str, like: Recipe, head: Any = "causal") -> Any:
        parts.append(begin(builtin_models.resolve(path), like, s.tokenizer, s.backend, s.bf16, s.say, head))
        return parts[-1].model

    policy = load(s.path, recipe)
    value = head = reference = None
    source = value_source(recipe.ppo, s.path)
    if recipe.peft.use_peft or recipe.ppo.value_model == "shared":
        head = _head(policy, source, recipe, s)
    else:
        value = load(source, frozen, "reward")
    if recipe.peft.use_peft:
        if recipe.ppo.value_model == "separate":
            _add_value_adapter(policy, s)
    else:
        reference = load(s.path, frozen)
    models = [load(reward.name.source, frozen, "reward") for reward in rewards]
    actors = Actors(policy, value, head, reference, models, recipe.ppo.temperature)
    finish(actors, parts, recipe, s.backend, s.world, s.bf16, actors.recomputing)
    policy.config.pad_token_id = s.tokenizer.pad_token_id
    return actors


def model_rewards(setting: Setting) -> list[ModelReward]:
    """The reward models of a recipe. Raises :class:`UserError` where one cannot judge what the policy writes."""
    names = [name for name in reward_names(setting.recipe.ppo) if not name.is_function]
    return [_model_reward(setting, name, number) for number, name in enumerate(names)]


def _model_reward(setting: Setting, name: RewardName, number: int) -> ModelReward:
    path = builtin_models.resolve(name.source)
    section = setting.recipe.model.model_copy(update={"model_name_or_path": path})
    try:
        config = load_config(path, section).to_dict()
        tokenizer = load_tokenizer(path, section, lambda _: None)
    except UserError as error:
        raise UserError(f"{name.key}: {str(error).partition(': ')[2]}") from error
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if not any(one.endswith("ForSequenceClassification") for one in config.get("architectures") or []) or labels != 1:
        raise UserError(
            f"{name.key}: {name.source} is no reward model: it must be for sequence classification with one label; "
            "train one with stage=reward"
        )
    fault = tokenizer_fault(tokenizer, setting.tokenizer)
    if fault and not setting.recipe.ppo.retokenize:
        raise UserError(f"{name.key}: {name.source}: {fault}; set ppo.retokenize=true to give it the text anew")
    pad = config.get("pad_token_id")
    return ModelReward(name, number, tokenizer if fault else None, tokenizer.pad_token_id if pad is None else int(pad),
                       max_positions(config))  # fmt: skip


def _head(policy: Any, source: str, recipe: Recipe, setting: Setting) -> nn.Linear:
    """A value head for the policy's hidden states: that of the reward model where its width is the policy's."""
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    width = base.get_output_embeddings().in_features
    head = nn.Linear(width, 1, bias=False, dtype=getattr(torch, recipe.model.dtype))
    draw_head([("score.weight", head.weight)], recipe.train.seed)
    files = tensor_files(builtin_models.resolve(source), recipe.model.model_revision)
    name = f"{SCORE}.weight"
    if files is not None and name in files and files.shape(name) == (1, width):
        with torch.no_grad():
            head.weight.copy_(files.rows(name, 0, 1))
        setting.say(f"value: begins with the head of {source}, on the policy's own weights")
    return head


def _add_value_adapter(policy: Any, setting: Setting) -> None:
    """Give the policy a second adapter, which is trained beside the first."""
    peft = setting.recipe.peft
    one_type = setting.backend.stage == 3 and not peft.load_in_4bit
    policy.add_adapter(VALUE, adapters.lora_config(peft), autocast_adapter_dtype=not one_type)
    for name, parameter in policy.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad_(True)
