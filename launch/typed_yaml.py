"""A YAML file of this project's into a typed tree: every fault in one line with file, line, key and mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sft_dist.errors import UserError
from sft_dist.recipe_names import near_name
from sft_dist.recipe_yaml import COMMAND_LINE, NO_LINE, Fault, Items, Keys, Node, read

Tree = TypeVar("Tree", bound=BaseModel)
_WORDS = {"too_short": "is empty; name at least one", "model_type": "should be keys and values"}
_MOST_BYTES = 256 * 1024


def read_typed(file: Path, kind: type[Tree], what: str, overrides: Sequence[str] = ()) -> Tree:
    """The tree in a file, with `key=value` overrides of its keys on top. `what` is what such a file is called.

    Raises :class:`UserError` with all faults, one a line.
    """
    root, faults = read_keys(file, what, overrides)
    if not faults:
        try:
            return kind.model_validate(_plain(root))
        except ValidationError as error:
            faults = list(_faults(error, root, kind))
    raise UserError("\n".join(dict.fromkeys(fault.line(str(file)) for fault in faults)))


def read_keys(file: Path, what: str, overrides: Sequence[str] = ()) -> tuple[Keys, list[Fault]]:
    """The nodes of a file, which know their lines, with the overrides on top, and what is wrong with their form.

    Raises :class:`UserError` for a file that cannot be read.
    """
    root, faults = _nodes(file, what)
    for word in overrides:
        faults += _override(root, word)
    return root, faults


def _nodes(file: Path, what: str) -> tuple[Keys, list[Fault]]:
    try:
        data = file.read_bytes()[: _MOST_BYTES + 1]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; name {what}") from error
    if len(data) > _MOST_BYTES:
        raise UserError(f"{file}: larger than {_MOST_BYTES // 1024} kB; name {what}")
    try:
        root, faults = read(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if isinstance(root, Keys):
        return root, faults
    return Keys(NO_LINE), faults or [Fault(NO_LINE, "", f"holds no keys; name {what}")]


def _override(root: Keys, word: str) -> list[Fault]:
    key, equals, text = word.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        return [Fault(COMMAND_LINE, word, "not of the form key=value")]
    node, faults = read(text, key, COMMAND_LINE)
    within = root
    for name in path[:-1]:
        below = within.entries.get(name)
        if not isinstance(below, Keys):
            below = within.entries[name] = Keys(COMMAND_LINE)
        within = below
    if node is not None:
        within.entries[path[-1]] = node
    return faults


def _plain(node: Node) -> Any:
    if isinstance(node, Keys):
        return {name: _plain(below) for name, below in node.entries.items()}
    return [_plain(below) for below in node.items] if isinstance(node, Items) else node.value


def _faults(error: ValidationError, root: Keys, kind: type[BaseModel]) -> Iterator[Fault]:
    for one in error.errors():
        path = [str(part) for part in one["loc"]]
        place, key = _place(root, path)
        if one["type"] == "extra_forbidden":
            near = near_name(path[-1], _names(kind, path[:-1]))
            yield Fault(place, key, "no such key" + (f", did you mean {near}" if near else ""))
        elif one["type"] == "missing":
            yield Fault(place, key, "is missing; give it a value")
        elif one["type"] in _WORDS:
            yield Fault(place, key, _WORDS[one["type"]])
        else:
            text = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            yield Fault(place, key, text if one["type"] == "value_error" else f"should be {text}")


def _place(root: Keys, path: Sequence[str]) -> tuple[int, str]:
    """The line of a key, and the key as far as the file has it: pydantic's path also names members of unions."""
    node: Node = root
    place = NO_LINE
    named: list[str] = []
    for part in path:
        if isinstance(node, Keys) and part in node.entries:
            node = node.entries[part]
        elif isinstance(node, Items) and part.isdigit() and int(part) < len(node.items):
            node = node.items[int(part)]
        elif isinstance(node, Keys):
            return place, ".".join([*named, part])
        else:
            break
        named.append(part)
        place = node.place
    return place, ".".join(named)


def _names(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that a section has."""
    names = iter(path)
    for part in names:
        field = kind.model_fields.get(part)
        below = [field.annotation, *get_args(field.annotation)] if field is not None else []
        if field is not None and get_origin(field.annotation) is dict:
            # A name of the user's stands between.
            next(names, None)
        section = next((one for one in below if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if section is None:
            return []
        kind = section
    return list(kind.model_fields)
