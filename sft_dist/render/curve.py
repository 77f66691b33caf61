"""A learning curve as inline SVG, drawn without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.render.axis import Axis

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46


@dataclass(frozen=True)
class Curve:
    """Loss in nats per token over optimizer steps, as (step, loss) in order of steps."""

    train: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...] = ()


def learning_curve_svg(points: Points, eval_points: Points = (), unit: str = "loss (nats per token)") -> str:
    """Training loss, and held-out loss where given, over optimizer steps.

    `points` and `eval_points` hold (step, loss), `unit` is the axis's title. Values that are not finite are left out;
    the result is empty where no point is left. The colours follow the page's `--train-line` and `--held-line`.
    """
    train, held = _finite(points), _finite(eval_points)
    every = [*train, *held]
    if not every:
        return ""
    steps = [step for step, _ in every]
    x = Axis.over(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT, 6, whole=True)
    losses = [loss for _, loss in every]
    y = Axis.over(min(losses), max(losses), _HEIGHT - _BOTTOM, _TOP, 5, rounded=True)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(_caption(train, held))}">',
        *grid(x, y, _HEIGHT, "optimizer step", unit),
        *_series(_thinned(train, _WIDTH), x, y, "var(--train-line, #2a62c4)", dots=len(train) <= 12),
        *_series(_thinned(held, _WIDTH), x, y, "var(--held-line, #b4530a)", dots=True),
        *_legend(bool(train), bool(held)),
        "</svg>",
    ]
    return "\n".join(parts)


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _thinned(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def grid(x: Axis, y: Axis, height: int, below: str, above: str) -> list[str]:
    """Lines and ticks of a picture of this height, and what its axes are, as plain text."""
    line = 'style="stroke:var(--line, #dfe1e4)"'
    text = 'style="fill:var(--soft, #5b626b)"'
    parts = []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" {line}/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" {text}>{y.label(tick)}</text>')
    floor = height - _BOTTOM
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 5}" {line}/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 20}" text-anchor="middle" {text}>{x.label(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle" {text}>{html.escape(below)}</text>')
    parts.append(f'<text x="{_LEFT}" y="16" text-anchor="start" {text}>{html.escape(above)}</text>')
    return parts


def _series(points: list[tuple[int, float]], x: Axis, y: Axis, colour: str, dots: bool) -> list[str]:
    places = [f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in points]
    parts = []
    if len(places) > 1:
        style = f"fill:none;stroke:{colour};stroke-width:2;stroke-linejoin:round"
        parts.append(f'<polyline points="{" ".join(places)}" style="{style}"/>')
    if dots or len(places) == 1:
        for place in places:
            cx, cy = place.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" style="fill:{colour}"/>')
    return parts


def _legend(train: bool, held: bool) -> list[str]:
    entries = [("training", "var(--train-line, #2a62c4)")] * train + [("held out", "var(--held-line, #b4530a)")] * held
    parts = []
    for at, (name, colour) in enumerate(reversed(entries)):
        left = _WIDTH - _RIGHT - 92 * (at + 1)
        parts.append(f'<line x1="{left}" x2="{left + 20}" y1="12" y2="12" style="stroke:{colour};stroke-width:3"/>')
        parts.append(f'<text x="{left + 27}" y="16" style="fill:var(--ink, #1c1e21)">{name}</text>')
    return parts


def _caption(train: list[tuple[int, float]], held: list[tuple[int, float]]) -> str:
    told = [
        f"{name} loss from {part[0][1]:.3f} at step {part[0][0]} to {part[-1][1]:.3f} at step {part[-1][0]}"
        for name, part in (("training", train), ("held-out", held))
        if part
    ]
    return "Learning curve: " + ", ".join(told)
