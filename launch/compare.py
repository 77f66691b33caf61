"""The models of `sft-dist compare`: their names and where they lie, and the recipe that names the prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from launch import recipe_files
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe

_NAMED = re.compile(r"([\w.-]+)=(.+)")
# Folders of a run that hold its model.
_INNER = ("model", "merged")


def arguments(models: Sequence[str], reward: str, recipe: str | None) -> list[str]:
    """What `sft_dist.compare` is called with. Raises :class:`UserError`."""
    named = [_named(word) for word in models]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice}: two models have this name; give them names: a={named[0][1]} b={named[1][1]}")
    first, file = recipe_files.model_and_recipe(named[0][1], recipe)
    stage = load_recipe(file).stage
    if stage != "sft":
        raise UserError(f"{file}: a recipe of stage {stage}, whose data are no conversations; name another by --recipe")
    paths = [first, *(recipe_files.model_folder(path) for _, path in named[1:])]
    judge = recipe_files.model_folder(reward)
    return [str(file), judge, *(f"{name}={path}" for name, path in zip(names, paths, strict=True))]


def _named(word: str) -> tuple[str, str]:
    """Name and path of `NAME=PATH`, or a path under the name of its run's folder."""
    if (given := _NAMED.fullmatch(word)) and not Path(word).exists():
        return given[1], given[2]
    path = Path(word).expanduser()
    return (path.parent.name if path.name in _INNER and path.parent.name else path.name), word
