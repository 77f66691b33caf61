"""A node of a recipe into the value of the type that a setting declares, or the words for why it is none."""

from __future__ import annotations

import difflib
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sft_dist.recipe_yaml import Items, Keys, Node, Scalar, plain_value

_LONGEST_SHOWN = 60
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
# The narrowest first: 512 is a whole number before it is a number, a word is a text before it is a list of one.
_RANK = (bool, Literal, int, float, str, list, dict)
_WORDS = {bool: ["true", "false"], int: ["a whole number"], float: ["a number"], str: ["text"], list: ["a list"],
          dict: ["keys and values"], NoneType: ["null"]}  # fmt: skip
# What other tools call the same.
_SAME = {"bf16": "bfloat16", "fp32": "float32", "adamw": "adamw_torch", "none": "no", "false": "no", "epochs": "epoch",
         "sharegpt": "conversations", "chatml": "messages", "openai": "messages", "alpaca": "instruction",
         "flash_attention": "flash_attention_2", "deepspeed": "zero2"}  # fmt: skip


class Wrong(ValueError):
    """A value that does not fit; the message is `expected ..., got ...[, did you mean ...]`."""


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, the narrowest first; a Literal stays whole."""
    return tuple(sorted(_flat(annotation), key=_rank))


def takes_keys(annotation: Any) -> bool:
    """Whether a value may have keys of its own below it."""
    return any(_base(kind) is dict for kind in _flat(annotation))


def coerce(node: Node, annotation: Any) -> Any:
    """The plain value of a node under an annotation. Raises :class:`Wrong`."""
    allowed = kinds(annotation)
    if isinstance(node, Scalar) and node.value is None:
        if NoneType in allowed:
            return None
        raise Wrong("has no value; write one")
    for kind in allowed:
        base = _base(kind)
        if base is list and isinstance(node, Items):
            return [_item(item, get_args(kind)[0], number) for number, item in enumerate(node.items, 1)]
        if base is list and isinstance(node, Scalar) and str not in allowed:
            return [coerce(node, get_args(kind)[0])]
        if base is dict and isinstance(node, Keys):
            return _plain(node)
        if isinstance(node, Scalar) and base in _SCALARS:
            value = _SCALARS[base](node, kind)
            if value is not None:
                return value
    raise Wrong(f"expected {_expected(allowed)}, got {shown(node)}{_hint(node, allowed)}")


def shown(node: Node) -> str:
    """A node's value in a message, shortened."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Keys):
        return "keys and values"
    if node.value is None:
        return "nothing"
    text = repr(node.text) if isinstance(node.value, str) else node.text
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def alternatives(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`, `one of a, b, c, d`."""
    if len(words) > 3:
        return f"one of {', '.join(words)}"
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _rank(kind: Any) -> int:
    return _RANK.index(_base(kind)) if _base(kind) in _RANK else len(_RANK)


def _flat(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _flat(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _flat(part)]
    return [annotation]


def _base(kind: Any) -> Any:
    return get_origin(kind) or kind


def _item(node: Node, annotation: Any, number: int) -> Any:
    try:
        return coerce(node, annotation)
    except Wrong as wrong:
        raise Wrong(f"item {number}: {wrong}") from None


def _plain(node: Node) -> Any:
    if isinstance(node, Keys):
        return {name: _plain(value) for name, value in node.entries.items()}
    if isinstance(node, Items):
        return [_plain(item) for item in node.items]
    if isinstance(node.value, float) and not math.isfinite(node.value):
        raise Wrong(f"expected a finite number, got {node.text}")
    return node.value


def _bool(node: Scalar, _: Any) -> bool | None:
    return node.value if isinstance(node.value, bool) else _YES_NO.get(node.text.lower())


def _number(node: Scalar) -> int | float | None:
    value = plain_value(node.text.strip()) if isinstance(node.value, str) else node.value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _int(node: Scalar, _: Any) -> int | None:
    value = _number(node)
    # Beyond 64 bits no tensor or file can hold it.
    if value is None or not math.isfinite(value) or value != int(value) or abs(value) >= 2**63:
        return None
    return int(value)


def _float(node: Scalar, _: Any) -> float | None:
    value = _number(node)
    if value is not None and not math.isfinite(value):
        raise Wrong(f"expected a finite number, got {node.text}")
    return None if value is None else float(value)


def _str(node: Scalar, _: Any) -> str | None:
    # As written, so that a revision such as 1e10 or a folder such as 007 stays what it is.
    return None if isinstance(node.value, bool) else node.text


def _literal(node: Scalar, kind: Any) -> str | None:
    return node.text if node.text in get_args(kind) and isinstance(node.value, str) else None


_SCALARS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, Literal: _literal}


def _expected(allowed: tuple[Any, ...]) -> str:
    # Whoever may leave a number out knows the number first.
    named = [kind for kind in allowed if kind is not NoneType] + [kind for kind in allowed if kind is NoneType]
    if float in named and int in named:
        named.remove(int)
    words: list[str] = []
    for kind in named:
        words += get_args(kind) if _base(kind) is Literal else _WORDS[_base(kind)]
    return alternatives(words)


def _hint(node: Node, allowed: tuple[Any, ...]) -> str:
    choices = [word for kind in allowed if _base(kind) is Literal for word in get_args(kind)]
    if not choices or not isinstance(node, Scalar):
        return ""
    word = node.text.lower()
    near = [_SAME[word]] if _SAME.get(word) in choices else difflib.get_close_matches(word, choices, n=1)
    return f", did you mean {near[0]}" if near else ""
