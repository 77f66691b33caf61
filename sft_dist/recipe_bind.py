"""The nodes of a recipe into the typed tree, with every fault noted on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sft_dist.combinations import combinations
from sft_dist.config import Recipe, trackers
from sft_dist.recipe_names import SECTIONS, unknown_key, unknown_section
from sft_dist.recipe_values import Wrong, coerce, shown
from sft_dist.recipe_yaml import NO_LINE, Fault, Items, Keys, Node, Scalar

_BOUNDS = {
    "greater_than": "must be above {gt:.0f}",
    "greater_than_equal": "must be at least {ge:.0f}",
    "less_than": "must be below {lt:.0f}",
    "string_too_short": "must not be empty",
}


def field_at(path: Sequence[str]) -> FieldInfo | None:
    """The declared field at a path of one or two names, None where there is none."""
    if len(path) == 1:
        return Recipe.model_fields.get(path[0])
    section = SECTIONS.get(path[0])
    return section.model_fields.get(path[1]) if section is not None and len(path) == 2 else None


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
        values = self.values.setdefault(section, {})
        for key, below in node.entries.items():
            dotted = f"{section}.{key}"
            self.nodes[dotted] = below
            field = field_at([section, key])
            if field is not None:
                self._value(dotted, field, below, values)
            elif dotted not in self.faulty:
                self._unknown(dotted, *unknown_key(section, key))

    def _value(self, dotted: str, field: FieldInfo, node: Node, values: dict[str, Any]) -> None:
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
                if field.is_required() and not known:
                    example = (field.examples or ["..."])[0]
                    text = f"missing; write `{key}: {example}` (or your own) under `{section}:`"
                    self.faults.append(Fault(NO_LINE, dotted, text))
                    self.faulty.add(dotted)

    def _bounds(self) -> None:
        """Note what pydantic says of values of the right type, and leave these values out."""
        try:
            Recipe.model_validate(self._filled())
        except ValidationError as error:
            for found in error.errors(include_url=False, include_input=False):
                section, key = (*map(str, found["loc"]), "")[:2]
                dotted = f"{section}.{key}" if key else section
                words = _BOUNDS[found["type"]].format(**found["ctx"]) if found["type"] in _BOUNDS else found["msg"]
                got = f", got {shown(self.nodes[dotted])}" if dotted in self.nodes else ""
                if dotted not in self.faulty:
                    self._note(dotted, words + got)
                self.values.get(section, {}).pop(key, None)

    def _filled(self) -> dict[str, Any]:
        """The values, with examples for the required ones that are not there."""
        filled = dict(self.values)
        for section, kind in SECTIONS.items():
            examples = {k: (f.examples or ["-"])[0] for k, f in kind.model_fields.items() if f.is_required()}
            filled[section] = examples | filled.get(section, {})
        return filled

    def _unsure_keys(self) -> set[str]:
        unsure = self.faulty | self.meant
        return unsure | {f"{s}.{k}" for s in unsure & set(SECTIONS) for k in SECTIONS[s].model_fields}

    def _note(self, dotted: str, text: str) -> None:
        at = dotted
        while at and at not in self.nodes:
            at = at.rpartition(".")[0]
        self.faults.append(Fault(self.nodes[at].place if at else NO_LINE, dotted, text))
        self.faulty.add(dotted)


def _trackers(node: Node) -> Node:
    """`none` and `all`, alone or in a list, as the lists that they stand for."""
    single = node.items[0] if isinstance(node, Items) and len(node.items) == 1 else node
    if isinstance(single, Scalar) and single.value in ("none", "all"):
        return Items(node.place, [Scalar(node.place, name, name) for name in trackers(single.value)])
    return node
