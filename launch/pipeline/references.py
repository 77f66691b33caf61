"""`${stages.NAME.output}` and `${stages.NAME.run}`: which stages a text refers to, and the paths in their place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sft_dist.recipe_yaml import COMMAND_LINE, Items, Keys, LineOf, Node, Scalar

_ANY = re.compile(r"\$\{([^{}]*)\}")
_GOOD = re.compile(r"stages\.([^.]+)\.(output|run)")
FORMS = "${stages.NAME.output} or ${stages.NAME.run}"


@dataclass(frozen=True)
class Reference:
    """What a text refers to: the model (`output`) or the folder (`run`) of a stage."""

    stage: str
    what: Literal["output", "run"]

    def __str__(self) -> str:
        return f"${{stages.{self.stage}.{self.what}}}"


def in_text(text: str) -> tuple[list[Reference], list[str]]:
    """The references in a text, and what is wrong with those that are none."""
    found, wrong = [], []
    for inside in _ANY.findall(text):
        good = _GOOD.fullmatch(inside)
        if good:
            found.append(Reference(good[1], "output" if good[2] == "output" else "run"))
        else:
            wrong.append(f"${{{inside}}} is not read; write {FORMS}")
    return found, wrong


def replaced(text: str, path_of: Callable[[Reference], str]) -> str:
    """The text with paths in place of the references."""

    def path(match: re.Match[str]) -> str:
        good = _GOOD.fullmatch(match[1])
        return path_of(Reference(good[1], "output" if good[2] == "output" else "run")) if good else match[0]

    return _ANY.sub(path, text)


def texts(node: Node | None) -> list[Scalar]:
    """All texts below a node."""
    if isinstance(node, Scalar):
        return [node] if isinstance(node.value, str) else []
    below = node.entries.values() if isinstance(node, Keys) else node.items if isinstance(node, Items) else ()
    return [text for each in below for text in texts(each)]


def rewritten(node: Node, file: str, path_of: Callable[[Reference], str]) -> Node:
    """A copy of a node with paths in place of the references, whose places are lines of `file`."""
    place = node.place if node.place == COMMAND_LINE else LineOf(node.place, file)
    if isinstance(node, Keys):
        return Keys(place, {name: rewritten(below, file, path_of) for name, below in node.entries.items()})
    if isinstance(node, Items):
        return Items(place, [rewritten(below, file, path_of) for below in node.items])
    if isinstance(node.value, str):
        text = replaced(node.text, path_of)
        return Scalar(place, text, text)
    return Scalar(place, node.value, node.text)
