"""What can be known of DPO's reference before a GPU is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import hub
from launch.fit import config_of
from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.dpo.likeness import other_model, other_vocabulary
from sft_dist.errors import UserError

_KEY = "dpo.ref_model"


def reference(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Lines of a check, each with whether it is known to be well; none where the recipe names no reference.

    Raises :class:`UserError` for a model that the policy cannot be compared with.
    """
    name = recipe.dpo.ref_model
    if recipe.stage != "dpo" or name is None:
        return
    policy, config = config_of(recipe), _config(recipe, name)
    if config is None:
        yield False, f"{_KEY}: {name} is not in the cache, and the hub cannot be reached from here"
        return
    ours = recipe.model.model_name_or_path
    fault = other_model(policy, config, ours) if policy is not None else None
    vocabularies = _vocabulary(Path(ours)), _vocabulary(Path(name))
    if fault is None and vocabularies[0] is not None and vocabularies[1] is not None:
        fault = other_vocabulary(vocabularies[0], vocabularies[1], ours)
    if fault is not None:
        raise UserError(f"{_KEY}: {name}: {fault}")
    yield True, f"{_KEY}: {name} has the architecture of {ours}"


def _config(recipe: Recipe, name: str) -> Mapping[str, Any] | None:
    if builtin_models.is_built_in(name):
        return builtin_models.CONFIG
    path = Path(name)
    if path.exists():
        return hub.local_config(path, recipe.model, _KEY)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{_KEY}: no such folder: {name}; give a model directory or a hub id")
    answer = hub.model_config(name, recipe.dpo.ref_model_revision)
    if answer.fault:
        raise UserError(f"{_KEY}: {name}: {answer.fault}")
    return answer.config


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Tokens and ids of a model directory's tokenizer, as far as its one file tells."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{_KEY}: {file}: not readable: {error}; copy the model anew") from error
    vocabulary = (held.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    return vocabulary | {token["content"]: token["id"] for token in held.get("added_tokens") or []}
