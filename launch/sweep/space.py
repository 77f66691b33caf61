"""The settings that a sweep tries: lists and ranges of values, and the points that a grid or chance makes of them.

The points follow from the parameters and the seed alone. A random value follows from seed, trial and key: more trials
or one more parameter leave the values of the others what they were.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sft_dist.recipe_values import Wrong, alternatives, coerce, kinds, shown
from sft_dist.recipe_yaml import Items, Keys, Node, Scalar

# Of a float that is drawn: what people write in a table, and what is equal on every machine.
_DIGITS = 3
# Draws for one trial, of which each was there before.
_TRIES = 100
_OF_A_RANGE = ("min", "max", "log")
_ELSEWHERE = {"low": "min", "high": "max", "lower": "min", "upper": "max", "start": "min", "stop": "max",
              "distribution": "log: true", "values": "a list", "value": "a list of one"}  # fmt: skip
Point: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """A list of values, of whatever type the key takes."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `log`: each factor is as likely; `whole`: integers."""

    low: float
    high: float
    log: bool
    whole: bool


Parameter: TypeAlias = Choices | Range


def parameter(node: Node, annotation: Any) -> Parameter:
    """What stands below the key of a parameter, whose setting has the type `annotation`. Raises :class:`Wrong`."""
    if isinstance(node, Items):
        return _choices(node, annotation)
    if isinstance(node, Keys):
        return _range(node, annotation)
    raise Wrong(f"expected a list of values or a range, got {shown(node)}; a fixed value stands under `set:`")


def _choices(node: Items, annotation: Any) -> Choices:
    values: dict[str, Any] = {}
    for number, item in enumerate(node.items, 1):
        try:
            value = coerce(item, annotation)
        except Wrong as wrong:
            raise Wrong(f"value {number}: {wrong}") from None
        if written(value) in values:
            raise Wrong(f"{written(value)} is listed twice; keep one")
        values[written(value)] = value
    if not values:
        raise Wrong("the list is empty; give the values to try")
    return Choices(tuple(values.values()))


def _range(node: Keys, annotation: Any) -> Range:
    for name in node.entries:
        if name not in _OF_A_RANGE:
            near = f", did you mean {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise Wrong(f"{name} is no word of a range{near}; write a list, or {{min: ..., max: ..., log: true}}")
    number = next((kind for kind in (float, int) if kind in kinds(annotation)), None)
    if number is None:
        raise Wrong("a range is for numbers only; list the values")
    ends = []
    for name in ("min", "max"):
        if name not in node.entries:
            raise Wrong(f"{name} is missing; write {{min: ..., max: ...}}")
        try:
            ends.append(coerce(node.entries[name], number))
        except Wrong as wrong:
            raise Wrong(f"{name}: {wrong}") from None
    log = node.entries.get("log")
    if log is not None and not (isinstance(log, Scalar) and isinstance(log.value, bool)):
        raise Wrong(f"log: expected {alternatives(['true', 'false'])}, got {shown(log)}")
    low, high = ends
    if low >= high:
        raise Wrong(f"min ({low:g}) is not below max ({high:g})")
    is_log = isinstance(log, Scalar) and log.value is True
    if is_log and low <= 0:
        raise Wrong(f"min ({low:g}) has to be above 0 where log is true")
    return Range(low, high, is_log, number is int)


def grid_size(parameters: Mapping[str, Parameter]) -> int:
    """Points of the grid; ranges count as one value."""
    return math.prod(len(p.values) for p in parameters.values() if isinstance(p, Choices))


def grid(parameters: Mapping[str, Choices]) -> Iterator[Point]:
    """Every combination; the last parameter changes fastest."""
    for values in itertools.product(*(p.values for p in parameters.values())):
        yield dict(zip(parameters, values, strict=True))


def draw(parameters: Mapping[str, Parameter], trials: int, seed: int) -> list[Point]:
    """So many different points, or as many as there are: a point that was there before is drawn anew."""
    found: dict[str, Point] = {}
    for trial in range(trials):
        for again in range(_TRIES):
            point = {key: _drawn(p, random.Random(f"{seed}:{trial}:{again}:{key}")) for key, p in parameters.items()}
            if written(point) not in found:
                found[written(point)] = point
                break
    return list(found.values())


def _drawn(parameter: Parameter, chance: random.Random) -> Any:
    share = chance.random()
    if isinstance(parameter, Choices):
        return parameter.values[int(share * len(parameter.values))]
    # Each integer has the stretch of half a unit on either side, as far as it goes.
    half = 0.5 if parameter.whole else 0.0
    low, high = parameter.low - half, parameter.high + half
    value = math.exp(math.log(low) + share * math.log(high / low)) if parameter.log else low + share * (high - low)
    value = round(value) if parameter.whole else float(f"{value:.{_DIGITS}g}")
    return type(parameter.low)(min(max(value, parameter.low), parameter.high))


def written(value: Any) -> str:
    """A value as a word of a recipe's command line has it: JSON, which is YAML. Equal values are written alike."""
    return json.dumps(value, ensure_ascii=False)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """By dotted key: its last part, or as much as tells it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names
