"""Several small curves in one picture, one panel each, over the same axis."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.render.axis import Axis

_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 32, 40
_COLUMNS = 2


@dataclass(frozen=True)
class Panel:
    """A curve of (place, value), in order of places. `line`: a value to compare with, drawn dashed."""

    title: str
    points: Sequence[tuple[int, float]]
    line: float | None = None


def panels_svg(panels: Sequence[Panel], below: str) -> str:
    """The panels in two columns as inline SVG. `below`: what the places are.

    Values that are not finite are left out, and so are panels without a value.
    """
    shown = [Panel(one.title, [(x, y) for x, y in one.points if math.isfinite(y)], one.line) for one in panels]
    shown = [one for one in shown if one.points]
    if not shown:
        return ""
    rows = -(-len(shown) // _COLUMNS)
    size = f"0 0 {_COLUMNS * _WIDTH} {rows * _HEIGHT}"
    label = html.escape("; ".join(_caption(one) for one in shown))
    parts = [
        f'<svg viewBox="{size}" role="img" aria-label="{label}" font-family="system-ui, sans-serif" font-size="12">'
    ]
    for number, panel in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        parts.append(f'<g transform="translate({column * _WIDTH} {row * _HEIGHT})">')
        parts += _panel(panel, below)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"])


def _panel(panel: Panel, below: str) -> list[str]:
    places = [place for place, _ in panel.points]
    values = [value for _, value in panel.points] + ([] if panel.line is None else [panel.line])
    x = Axis.over(min(places), max(places), _LEFT, _WIDTH - _RIGHT, 5, whole=True)
    y = Axis.over(min(values), max(values), _HEIGHT - _BOTTOM, _TOP, 4, rounded=True)
    grid, soft = 'style="stroke:var(--line, #dfe1e4)"', 'style="fill:var(--soft, #5b626b)"'
    parts = [
        f'<text x="{_LEFT}" y="18" style="fill:var(--ink, #1c1e21);font-weight:600">{html.escape(panel.title)}</text>'
    ]
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" {grid}/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" {soft}>{y.label(tick)}</text>')
    for tick in x.ticks:
        place = f'x="{x.at(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle" {soft}>{x.label(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" text-anchor="middle" {soft}>{html.escape(below)}</text>')
    if panel.line is not None:
        at = y.at(panel.line)
        style = 'style="stroke:var(--held-line, #b4530a);stroke-dasharray:5 4;stroke-width:1.5"'
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" {style}/>')
    dots = " ".join(f"{x.at(place):.1f},{y.at(value):.1f}" for place, value in panel.points)
    colour = "var(--train-line, #2a62c4)"
    parts.append(f'<polyline points="{dots}" style="fill:none;stroke:{colour};stroke-width:2;stroke-linejoin:round"/>')
    if len(panel.points) <= 12:
        for dot in dots.split():
            cx, cy = dot.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" style="fill:{colour}"/>')
    return parts


def _caption(panel: Panel) -> str:
    (first, begin), (last, end) = panel.points[0], panel.points[-1]
    return f"{panel.title} from {begin:.3g} at {first} to {end:.3g} at {last}"
