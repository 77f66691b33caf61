"""What makes a run the same run: the settings of a recipe that bear on its numbers. This module is free of torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sft_dist.config import Recipe
from sft_dist.data.sources import is_local
from sft_dist.errors import RecipeError, UserError
from sft_dist.recipe import load_recipe

# What may change from one part of a run to the next; any other key is held to bear on the numbers. Rows per optimizer
# step, which follow from `parallel` and two keys of `train`, are compared where the number of processes is known.
_FREE = (
    "output", "eval", "parallel", "checkpoint", "guard",
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.per_device_eval_batch_size",
    "train.save_strategy", "train.save_steps", "train.eval_strategy", "train.eval_steps",
    "train.logging_*", "train.report_to", "train.run_name", "train.dataloader_num_workers",
    "train.gradient_checkpointing", "train.gradient_checkpointing_kwargs",
    "data.dataset_num_proc", "data.max_bad_records",
)  # fmt: skip
_PATHS = ("data.chat_template_path",)
# Paths where they lie on this machine or are written as paths; else names on the hub.
_PATHS_OR_NAMES = ("model.model_name_or_path", "data.dataset_name", "data.dataset_test_split",
                   "data.mixture.*.dataset_name")  # fmt: skip
# The order of these matters: the documents of a source are shuffled by its number.
_ORDERED = ("data.mixture",)
_MOST_TOLD = 5
_LONGEST_SHOWN = 100


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings that make two recipes different runs, each as `section.key: VALUE there, VALUE here`."""
    return list(_compared("", _significant(old), _significant(new)))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of the settings that bear on the numbers: equal where there are no :func:`differences`.

    Unlike that of :mod:`sft_dist.recipe` it leaves out what may change within a run.
    """
    return hashlib.sha256(_canonical_json("", _significant(recipe)).encode()).hexdigest()


def bears_on_numbers(key: str) -> bool:
    """Whether :func:`recipe_hash` looks at a setting, by its dotted key."""
    section, _, rest = key.partition(".")
    return not (_among(section, _FREE) or _among(f"{section}.{rest.partition('.')[0]}", _FREE))


def refuse_other_run(root: Path, recipe: Recipe) -> None:
    """Raise :class:`UserError` where the run in `root` is one of another recipe. An empty folder is fine."""
    held = root / "recipe.yaml"
    if not held.exists():
        return
    try:
        found = differences(load_recipe(held), recipe)
    except RecipeError as error:
        raise UserError(
            f"output.resume: {root} has a recipe that this version cannot read: {_told(str(error).splitlines(), 1)}; "
            "resume with the version that wrote it, or name another output.output_dir"
        ) from error
    if found:
        raise UserError(
            f"output.resume: {root} is a run of another recipe: {_told(found, _MOST_TOLD)}; "
            f"resume with its own recipe ({held}), or name another output.output_dir"
        )


def _significant(recipe: Recipe) -> dict[str, Any]:
    """The tree of a recipe without the sections and keys that are free."""
    return {
        section: {key: v for key, v in value.items() if not _among(f"{section}.{key}", _FREE)}
        if isinstance(value, dict)
        else value
        for section, value in recipe.model_dump(mode="json").items()
        if not _among(section, _FREE)
    }


def _compared(key: str, old: Any, new: Any) -> Iterator[str]:
    """What differs below a key, in the order of the keys."""
    if _canonical_json(key, old) == _canonical_json(key, new):
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{key}: {_shown(old)} there, {_shown(new)} here"
        return
    if key in _ORDERED and old.keys() == new.keys() and list(old) != list(new):
        yield f"{key}: in the order {', '.join(old)} there, {', '.join(new)} here"
    for name in [*old, *(name for name in new if name not in old)]:
        below = _below(key, name)
        if name in old and name in new:
            yield from _compared(below, old[name], new[name])
        else:
            there, here = (_shown(side[name]) if name in side else "not set" for side in (old, new))
            yield f"{below}: {there} there, {here} here"


def _canonical_json(key: str, value: Any) -> str:
    return json.dumps(_canonical(key, value), sort_keys=True, separators=(",", ":"))


def _canonical(key: str, value: Any) -> Any:
    """A value such that equal ones are written alike."""
    if isinstance(value, dict):
        below = {name: _canonical(_below(key, name), v) for name, v in value.items()}
        return list(below.items()) if key in _ORDERED else below
    if isinstance(value, list):
        return [_canonical(key, item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value and _is_path(key, value):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _is_path(key: str, value: str) -> bool:
    return _among(key, _PATHS) or (_among(key, _PATHS_OR_NAMES) and is_local(value))


def _among(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _shown(value: Any) -> str:
    """A value on one line, shortened."""
    plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    text = value if plain else json.dumps(value, ensure_ascii=False)
    half = _LONGEST_SHOWN // 2
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:half]}...{text[-half:]}"


def _told(lines: list[str], most: int) -> str:
    more = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {more} more" if more > 0 else "")
