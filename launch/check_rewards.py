"""What can be known of PPO's rewards, and of what its value model begins from, before a GPU is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import hub
from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.ppo.names import reward_names

_ADAPTER = "adapter_config.json"


def rewards(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Lines of a check, each with whether it is known to be well. Raises :class:`UserError` for what gives no rewards.

    Functions are tried with a sample of the records (see `sft_dist.preview_prompts`).
    """
    if recipe.stage != "ppo":
        return
    for name in reward_names(recipe.ppo):
        if not name.is_function:
            yield _reward(recipe, name.key, name.source)


def _reward(recipe: Recipe, key: str, name: str) -> tuple[bool, str]:
    path = Path(name)
    if path.exists():
        if (path / _ADAPTER).is_file() and recipe.peft.use_peft:
            return True, f"{key}: {name} is an adapter with its head"
        config: Mapping[str, Any] | None = hub.local_config(path, recipe.model, key)
    elif builtin_models.is_built_in(name):
        config = builtin_models.CONFIG
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"{key}: no such folder: {name}; give a reward run's model, a hub id or package.module:function"
        )
    else:
        answer = hub.model_config(name, recipe.model.model_revision)
        if answer.fault:
            raise UserError(f"{key}: {name}: {answer.fault}")
        config = answer.config
    if config is None:
        return False, f"{key}: {name} is not in the cache, and the hub cannot be reached from here"
    architectures = config.get("architectures") or []
    if not any(one.endswith("ForSequenceClassification") for one in architectures):
        raise UserError(
            f"{key}: {name} is no reward model ({', '.join(architectures)}); name one of a run of stage reward"
        )
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if labels != 1:
        raise UserError(f"{key}: {name} is a classifier of {labels} labels, where a reward model has one; name another")
    return True, f"{key}: {name} is a reward model ({', '.join(architectures)})"
