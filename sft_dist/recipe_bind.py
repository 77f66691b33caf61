"""The nodes of a recipe into the typed tree, with every fault noted on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sft_dist.combinations import combinations
from sft_dist.config import Recipe, trackers
from sft_dist.config_base import SOURCE_NAME, Section
from sft_dist.recipe_names import (
    SECTIONS,
    Unknown,
    sections_below,
    unknown_key,
    unknown_section,
    unknown_source_key,
)
from sft_dist.recipe_values import Wrong, coerce, shown
from sft_dist.recipe_yaml import NO_LINE, Fault, Items, Keys, Node, Scalar

_BOUNDS = {
    "greater_than": "must be above {gt:.0f}",
    "greater_than_equal": "must be at least {ge:.0f}",
    "less_than": "must be below {lt:.0f}",
    "string_too_short": "must not be empty",
}


# Required as long as `data.mixture` names no sources.
_ONE_SOURCE = "data.dataset_name"
UnknownKey: TypeAlias = Callable[[str, str], Unknown]


def field_at(path: Sequence[str]) -> FieldInfo | None:
    """The declared field at a path of names, None where there is none."""
    if len(path) == 1:
        return Recipe.model_fields.get(path[0])
    kind, rest = SECTIONS.get(path[0]), path[1:]
    while kind is not None and rest:
        field = kind.model_fields.get(rest[0])
        if len(rest) == 1:
            return field
        # A key, a name of the user's, a key below it.
        kind, rest = sections_below(field.annotation) if field is not None else None, rest[2:]
    return None


class Binder:
    """Brings the nodes of a recipe into the typed tree and notes every fault on the way."""

    def __init__(self, tree: Keys, faults: list[Fault]) -> None:
        self.tree = tree
        self.faults = faults
        self.values: dict[str, Any] = {}
        self.nodes: dict[str, Node] = {}
        # Nothing more is said of a key that has a fault, and a key that was meant by a wrong name is not missing.
        self.faulty = {fault.key for fault in faults}
        self.meant: set[str] = set()

    def recipe(self) -> Recipe:
        """The recipe. Where faults were noted, it only stands in for the one that was meant."""
        for name, node in self.tree.entries.items():
            self.nodes[name] = node
            if name in SECTIONS:
                self._section(name, node)
            elif name in Recipe.model_fields:
                self._value(name, Recipe.model_fields[name], node, self.values)
            elif name not in self.faulty:
                self._unknown(name, *unknown_section(name))
        self._missing()
        self._bounds()
        recipe = Recipe.model_validate(self._filled())
        for key, text in combinations(recipe, self._unsure_keys()):
            self._note(key, text)
        return recipe

    def _section(self, section: str, node: Node) -> None:
        if isinstance(node, Scalar) and node.value is None:
            return
        if not isinstance(node, Keys):
            self._note(section, f"expected the keys of a section, got {shown(node)}")
            return
        self._keys(section, SECTIONS[section], node, unknown_key, self.values.setdefault(section, {}))

    def _keys(self, outer: str, kind: type[Section], node: Keys, unknown: UnknownKey, values: dict[str, Any]) -> None:
        for key, below in node.entries.items():
            dotted = f"{outer}.{key}"
            self.nodes[dotted] = below
            field = kind.model_fields.get(key)
            if field is not None:
                self._value(dotted, field, below, values)
            elif dotted not in self.faulty:
                self._unknown(dotted, *unknown(outer, key))

    def _named(self, dotted: str, kind: type[Section], node: Keys) -> dict[str, Any]:
        """The values of sections that stand below names of the user's."""
        values: dict[str, Any] = {}
        for name, below in node.entries.items():
            own = f"{dotted}.{name}"
            self.nodes[own] = below
            if own in self.faulty:
                continue
            if not re.fullmatch(SOURCE_NAME, name):
                self._note(own, "a name is made of letters, digits, - and _; rename it")
            elif isinstance(below, Keys) or (isinstance(below, Scalar) and below.value is None):
                values[name] = self._source(own, kind, below)
            else:
                self._note(own, f"expected the keys of a source, got {shown(below)}; write `dataset_name: ...` here")
        return values

    def _source(self, dotted: str, kind: type[Section], node: Node) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if isinstance(node, Keys):
            self._keys(dotted, kind, node, unknown_source_key, values)
        for key, field in kind.model_fields.items():
            if field.is_required() and not (key in values or f"{dotted}.{key}" in self.faulty | self.meant):
                self._note(f"{dotted}.{key}", _missing_text(key, field, dotted.rpartition(".")[2]))
        return values

    def _value(self, dotted: str, field: FieldInfo, node: Node, values: dict[str, Any]) -> None:
        named = sections_below(field.annotation)
        if named is not None and isinstance(node, Keys) and dotted not in self.faulty:
            values[dotted.rpartition(".")[2]] = self._named(dotted, named, node)
            return
        if isinstance(node, Keys):
            self.nodes |= {f"{dotted}.{name}": below for name, below in node.entries.items()}
        if dotted in self.faulty:
            return
        try:
            node = _trackers(node) if dotted == "train.report_to" else node
            values[dotted.rpartition(".")[2]] = coerce(node, field.annotation)
        except Wrong as wrong:
            self._note(dotted, str(wrong))

    def _unknown(self, dotted: str, text: str, meant: str | None) -> None:
        self._note(dotted, text)
        if meant is not None:
            self.meant.add(meant)

    def _missing(self) -> None:
        for section, kind in SECTIONS.items():
            for key, field in kind.model_fields.items():
                dotted = f"{section}.{key}"
                known = key in self.values.get(section, {}) or {section, dotted} & (self.faulty | self.meant)
                required = field.is_required() or (dotted == _ONE_SOURCE and not self._has_mixture())
                if required and not known:
                    self.faults.append(Fault(NO_LINE, dotted, _missing_text(key, field, section)))
                    self.faulty.add(dotted)
                elif required and self.values.get(section, {}).get(key) == "":
                    self._note(dotted, f"{_BOUNDS['string_too_short']}, got {shown(self.nodes[dotted])}")

    def _has_mixture(self) -> bool:
        given = self.values.get("data", {}).get("mixture") is not None
        return given or any(dotted.startswith("data.mixture") for dotted in self.faulty | self.meant)

    def _bounds(self) -> None:
        """Note what pydantic says of values of the right type, and leave these values out."""
        try:
            Recipe.model_validate(self._filled())
        except ValidationError as error:
            for found in error.errors(include_url=False, include_input=False):
                path = self._path(list(map(str, found["loc"])))
                dotted = ".".join(path)
                words = _BOUNDS[found["type"]].format(**found["ctx"]) if found["type"] in _BOUNDS else found["msg"]
                got = f", got {shown(self.nodes[dotted])}" if dotted in self.nodes else ""
                if dotted not in self.faulty:
                    self._note(dotted, words + got)
                values = self.values
                for name in path[:-1]:
                    values = values.get(name, {})
                values.pop(path[-1], None)

    def _path(self, location: list[str]) -> list[str]:
        """The names of the key at a location of pydantic's, which goes on within the types that a key can have."""
        end = 2
        while end < len(location) and ".".join(location[: end + 1]) in self.nodes:
            end += 1
        return location[:end]

    def _filled(self) -> dict[str, Any]:
        """The values, with examples for the required ones that are not there."""
        filled = dict(self.values)
        for section, kind in SECTIONS.items():
            filled[section] = _with_examples(kind, filled.get(section, {}))
        return filled

    def _unsure_keys(self) -> set[str]:
        unsure = self.faulty | self.meant
        # What is wrong below a key makes the key unsure, and what is wrong with a section all of its keys.
        unsure |= {".".join(dotted.split(".")[:2]) for dotted in unsure}
        return unsure | {f"{s}.{k}" for s in unsure & set(SECTIONS) for k in SECTIONS[s].model_fields}

    def _note(self, dotted: str, text: str) -> None:
        at = dotted
        while at and at not in self.nodes:
            at = at.rpartition(".")[0]
        self.faults.append(Fault(self.nodes[at].place if at else NO_LINE, dotted, text))
        self.faulty.add(dotted)


def _missing_text(key: str, field: FieldInfo, below: str) -> str:
    example = (field.examples or ["..."])[0]
    return f"missing; write `{key}: {example}` (or your own) under `{below}:`"


def _with_examples(kind: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section, with examples for the required ones that are not there."""
    filled = {k: (f.examples or ["-"])[0] for k, f in kind.model_fields.items() if f.is_required()} | values
    for key, field in kind.model_fields.items():
        below, named = sections_below(field.annotation), filled.get(key)
        if below is not None and isinstance(named, dict):
            filled[key] = {name: _with_examples(below, inner) for name, inner in named.items()}
    return filled


def _trackers(node: Node) -> Node:
    """`none` and `all`, alone or in a list, as the lists that they stand for."""
    single = node.items[0] if isinstance(node, Items) and len(node.items) == 1 else node
    if isinstance(single, Scalar) and single.value in ("none", "all"):
        return Items(node.place, [Scalar(node.place, name, name) for name in trackers(single.value)])
    return node
