"""Recipes: a YAML file and the overrides of the command line into the typed tree, and back into text.

Every fault is found in one reading and told in one line: `FILE:LINE: section.key: what is wrong[, did you mean X]`,
or `command line: section.key: ...` for an override. This module is free of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType

from sft_dist.combinations import combinations
from sft_dist.config import Recipe
from sft_dist.errors import RecipeError
from sft_dist.recipe_bind import Binder, field_at
from sft_dist.recipe_docs import document, json_schema, write_files
from sft_dist.recipe_names import SECTIONS, near_name
from sft_dist.recipe_values import kinds, shown, takes_keys
from sft_dist.recipe_yaml import COMMAND_LINE, NO_LINE, Fault, Keys, Node, Scalar, is_text, read, write

__all__ = ["combinations", "document", "dump_recipe", "json_schema", "load_recipe", "recipe_hash"]

# Dumped recipes have about 4 kB; what is larger is a data file given by mistake.
_MOST_BYTES = 256 * 1024
_HEAD = "# A resolved recipe: all settings of one run, defaults included. It repeats the run.\n"


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), layers: Sequence[Mapping[str, Node]] = ()
) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides, the later of which win.

    `layers` are settings by dotted key that another file puts on top, before the overrides; their places are
    :class:`~sft_dist.recipe_yaml.LineOf` that file.

    Raises :class:`RecipeError` with all faults, one a line, in the order of the file.
    """
    file = os.fsdecode(path)
    tree, faults = _read_file(file)
    # Overrides are looked at for their form even where there is no recipe to put them into.
    within = Keys(NO_LINE) if tree is None else tree
    for layer in layers:
        for key, node in layer.items():
            faults += _put(within, key.split("."), node)
    faults += _override(within, overrides)
    recipe = None if tree is None else Binder(tree, faults).recipe()
    if recipe is None or faults:
        lines = [fault.line(file) for fault in sorted(faults, key=lambda fault: fault.place)]
        raise RecipeError("\n".join(dict.fromkeys(lines)))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The YAML of a recipe with all keys in declared order; :func:`load_recipe` gives an equal recipe."""
    return _HEAD + write(recipe.model_dump(mode="json"))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of all settings: equal for equal recipes, however their files are written."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_file(file: str) -> tuple[Keys | None, list[Fault]]:
    """The nodes of a recipe file, None where it holds no recipe, and the faults."""
    text, fault = _text(file)
    if fault is not None:
        return None, [Fault(NO_LINE, "", fault)]
    node, faults = read(text)
    if isinstance(node, Keys) or faults:
        return node if isinstance(node, Keys) else None, faults
    sections = ", ".join(SECTIONS)
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return None, [Fault(NO_LINE, "", f"the file is empty; a recipe has the sections {sections}")]
    return None, [Fault(node.place, "", f"not a recipe: expected the sections {sections}, got {shown(node)}")]


def _text(file: str) -> tuple[str, str | None]:
    """The text of a file, or what is wrong with the file."""
    path = Path(file)
    try:
        with open(file, "rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        if not path.parent.is_dir():
            return "", f"no such file, nor is there a folder {path.parent}"
        near = near_name(path.name, _recipes_in(path.parent))
        return "", "no such file" + (f", did you mean {path.parent / near}" if near else "; give the path of a recipe")
    except IsADirectoryError:
        inside = _recipes_in(path)
        return "", "is a folder; name a recipe file" + (f", did you mean {path / inside[0]}" if inside else "")
    except (OSError, ValueError) as error:
        return "", f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if len(data) > _MOST_BYTES:
        return "", f"not a recipe: larger than {_MOST_BYTES // 1024} kB"
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return "", f"not UTF-8 (byte {error.start}, line {line}); save the file as UTF-8"


def _recipes_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    except OSError:
        return []


def _override(tree: Keys, overrides: Sequence[str]) -> list[Fault]:
    """Put the overrides into the tree, in their order."""
    faults: list[Fault] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        path = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in path):
            faults.append(Fault(COMMAND_LINE, word or "''", "not of the form section.key=value"))
            continue
        node, found = _override_value(path, text)
        faults += found
        if node is not None:
            faults += _put(tree, path, node)
    return faults


def _override_value(path: list[str], text: str) -> tuple[Node | None, list[Fault]]:
    field = field_at(path)
    takes_text_only = field is not None and set(kinds(field.annotation)) <= {str, NoneType}
    # A glob, a `#` or a `: ` in a path or a template is no YAML, and nobody would quote it for a shell twice.
    if takes_text_only and text.strip() not in ("", "null") and text.strip()[0] not in "'\"":
        if not is_text(text):
            return None, [Fault(COMMAND_LINE, ".".join(path), "holds a character that no text can have")]
        return Scalar(COMMAND_LINE, text, text), []
    node, faults = read(text, ".".join(path), COMMAND_LINE)
    return (Scalar(COMMAND_LINE, None, "") if node is None and not faults else node), faults


def _put(tree: Keys, path: list[str], node: Node) -> list[Fault]:
    """Set one value; null takes back what the file says, where the setting itself cannot be null."""
    field, dotted = field_at(path), ".".join(path)
    if len(path) == 1 and path[0] in SECTIONS and isinstance(node, Keys):
        return [fault for name, value in node.entries.items() for fault in _put(tree, [*path, name], value)]
    for end in range(2, len(path)):
        outer = field_at(path[:end])
        if outer is not None and not takes_keys(outer.annotation):
            return [Fault(node.place, dotted, f"{'.'.join(path[:end])} is one value, without keys below it")]
    within = tree
    for name in path[:-1]:
        below = within.entries.get(name)
        if below is None or (isinstance(below, Scalar) and below.value is None):
            below = within.entries[name] = Keys(node.place)
        elif not isinstance(below, Keys):
            # What stands there is of the wrong type, and will be told.
            return []
        within = below
    resets = isinstance(node, Scalar) and node.value is None
    if resets and (len(path) > 2 or (field is not None and NoneType not in kinds(field.annotation))):
        within.entries.pop(path[-1], None)
        if field is not None and field.is_required():
            return [Fault(node.place, dotted, "has no default to go back to; give a value")]
    else:
        within.entries[path[-1]] = node
    return []


def main(words: Sequence[str] | None = None) -> int:
    """Write the schema and the documentation that are made of the typed tree."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.recipe", description=main.__doc__)
    parser.add_argument("--write", metavar="ROOT", type=Path, required=True, help="root of the checkout")
    for path in write_files(parser.parse_args(words).write):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
