"""The picture of a sweep: the metric against each varied setting, as an SVG file of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.render.axis import Axis, LogAxis
from sft_dist.render.page import escape
from sft_dist.render.sweep import Row, SweepReport, Varied, summary_line, value
from sft_dist.render.wording import number

_LEFT, _TOP = 78, 92
_PANEL, _HEIGHT, _GAP, _BELOW = 270, 200, 26, 84
_MOST_ACROSS = 3
# A line of this many letters fills a panel.
_LETTERS = 38
# From here on, equal factors are drawn equally far apart.
_DECADES_X, _DECADES_Y = 10, 100

# Plain colours and a background of its own: programs that show pictures know no variables, and pages have any colour.
_STYLE = """
  text { font: 13px system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; fill: #1c1e21; }
  .paper { fill: #fbfbf9; } .title { font-size: 17px; font-weight: 650; } .name { font-weight: 650; }
  .soft { fill: #5b626b; } .line { stroke: #dfe1e4; } .floor { stroke: #5b626b; }
  .dot { fill: #2a62c4; fill-opacity: .75; } .through { fill: none; stroke: #2a62c4; stroke-opacity: .45; stroke-width: 1.5; }
  .best { fill: #14692f; } .ring { fill: none; stroke: #14692f; stroke-width: 2; } .best-ink { fill: #14692f; }
  .cross { stroke: #a4241c; stroke-width: 2; } .cross-ink { fill: #a4241c; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e7e9; } .paper { fill: #16181b; } .soft { fill: #a0a7b0; } .line { stroke: #363b42; }
    .floor { stroke: #a0a7b0; } .dot { fill: #7ba9f5; } .through { stroke: #7ba9f5; }
    .best { fill: #6fd08c; } .ring { stroke: #6fd08c; } .best-ink { fill: #6fd08c; }
    .cross { stroke: #ff8f85; } .cross-ink { fill: #ff8f85; }
  }
"""  # noqa: E501


@dataclass(frozen=True)
class _Scale:
    """Where the values of a setting stand on the horizontal axis, and what is written there."""

    places: dict[str, float]
    ticks: tuple[tuple[float, str], ...]
    is_ordered: bool


def sweep_svg(report: SweepReport) -> str:
    """The picture: a panel for each varied setting; failed trials are crosses below. Texts are escaped."""
    across = min(len(report.varied), _MOST_ACROSS) or 1
    down = -(-len(report.varied) // across) or 1
    # Two panels' width at least, so that the title has room.
    width = _LEFT + max(across, 2) * (_PANEL + _GAP) + 8
    height = _TOP + down * (_HEIGHT + _BELOW) - 18
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(summary_line(report))}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        *_head(report, width),
    ]
    panel = (width - _LEFT - 8) / across - _GAP
    for number_, varied in enumerate(report.varied):
        left = _LEFT + (number_ % across) * (panel + _GAP)
        top = _TOP + (number_ // across) * (_HEIGHT + _BELOW)
        parts += _panel(report, varied, left, top, panel, is_first=number_ % across == 0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(report: SweepReport, width: int) -> Iterator[str]:
    title = _shortened(f"{report.name}: {report.metric}, {report.direction}", (width - _LEFT) // 9)
    yield f'<text class="title" x="{_LEFT}" y="32">{escape(title)}</text>'
    best = report.best
    if best is None or best.metric is None:
        yield f'<text class="soft" x="{_LEFT}" y="56">no trial is done yet</text>'
    else:
        settings = ", ".join(f"{v.name} {value(best.settings[v.key])}" for v in report.varied)
        told = _shortened(f"best: {number(best.metric, 4)}, {best.name} ({settings})", (width - _LEFT) // 7)
        yield f'<text class="best-ink" x="{_LEFT}" y="56">{escape(told)}</text>'
    signs = ["× failed"] if any(row.state == "failed" for row in report.rows) else []
    signs += (
        ["line: the best of each value"] if any(v.values is not None and _is_ordered(v) for v in report.varied) else []
    )
    yield f'<text class="soft" x="{_LEFT}" y="78">{" · ".join(signs)}</text>'


def _panel(report: SweepReport, varied: Varied, left: float, top: float, width: float, is_first: bool) -> Iterator[str]:
    floor = top + _HEIGHT
    has_failed = any(row.state == "failed" for row in report.rows)
    done = [row for row in report.rows if row.metric is not None]
    # Crosses have a strip of their own: they have no height that would mean anything.
    y = _vertical([row.metric or 0.0 for row in done], floor - (26 if has_failed else 8), top + 10)
    scale = _scale(varied, [row.settings[varied.key] for row in report.rows], left, width)
    for tick in y.ticks if done else ():
        at = y.at(tick)
        yield f'<line class="line" x1="{left:.1f}" x2="{left + width:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        if is_first:
            yield f'<text class="soft" x="{left - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{y.label(tick)}</text>'
    yield f'<line class="floor" x1="{left:.1f}" x2="{left + width:.1f}" y1="{floor}" y2="{floor}"/>'
    for at, label in scale.ticks:
        yield f'<line class="floor" x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 4}"/>'
        yield f'<text class="soft" x="{at:.1f}" y="{floor + 20}" text-anchor="middle">{escape(label)}</text>'
    middle = left + width / 2
    name = escape(_shortened(varied.key, _LETTERS))
    yield f'<text class="name" x="{middle:.1f}" y="{floor + 44}" text-anchor="middle">{name}</text>'
    yield from _through(varied, done, scale, y, report.greater_is_better)
    yield from _points(report, varied, scale, y, floor)


def _points(report: SweepReport, varied: Varied, scale: _Scale, y: Axis, floor: float) -> Iterator[str]:
    # The best is drawn last, above all others.
    for row in reversed(report.rows):
        x = scale.places[value(row.settings[varied.key])]
        title = f"<title>{escape(_told(report, row))}</title>"
        if row.state == "failed":
            yield (f'<path class="cross" d="M{x - 4:.1f} {floor - 15:.1f}l8 8m0 -8l-8 8">{title}</path>')
        elif row.metric is not None:
            at = y.at(row.metric)
            if row is report.best:
                yield f'<circle class="ring" cx="{x:.1f}" cy="{at:.1f}" r="8"/>'
            style = "best" if row is report.best else "dot"
            yield f'<circle class="{style}" cx="{x:.1f}" cy="{at:.1f}" r="4">{title}</circle>'


def _through(varied: Varied, done: Sequence[Row], scale: _Scale, y: Axis, greater: bool) -> Iterator[str]:
    """A line through the best of each value, where values were listed and have an order."""
    if varied.values is None or not scale.is_ordered:
        return
    best: dict[float, float] = {}
    for row in done:
        x, metric = scale.places[value(row.settings[varied.key])], row.metric or 0.0
        best[x] = (max if greater else min)(best.get(x, metric), metric)
    if len(best) > 1:
        points = " ".join(f"{x:.1f},{y.at(metric):.1f}" for x, metric in sorted(best.items()))
        yield f'<polyline class="through" points="{points}"><title>the best of each value</title></polyline>'


def _vertical(values: Sequence[float], start: float, end: float) -> Axis:
    if not values:
        return Axis.over(0, 1, start, end, 4)
    low, high = min(values), max(values)
    if low > 0 and high / low >= _DECADES_Y:
        return LogAxis.over_factors(low, high, start, end)
    return Axis.over(low, high, start, end, 4, rounded=True)


def _is_ordered(varied: Varied) -> bool:
    """Whether its values are numbers, or come from a range of them."""
    return varied.values is None or all(_is_number(one) for one in varied.values)


def _is_number(setting: Any) -> bool:
    return isinstance(setting, int | float) and not isinstance(setting, bool)


def _scale(varied: Varied, settings: Sequence[Any], left: float, width: float) -> _Scale:
    inner = (left + 18, left + width - 18)
    numbers = [s for s in settings if _is_number(s)]
    if len(numbers) != len(settings) or not numbers:
        return _by_name(varied, settings, inner)
    low, high = min(numbers), max(numbers)
    listed = sorted({s for s in varied.values or () if _is_number(s)})
    if listed:
        low, high = min(low, listed[0]), max(high, listed[-1])
    axis: Axis
    if low > 0 and (varied.log or (listed and high / low >= _DECADES_X)):
        axis = LogAxis.over_factors(low, high, *inner)
    else:
        axis = Axis.over(low, high, *inner, 4, whole=all(isinstance(s, int) for s in numbers), rounded=not listed)
    marks = [(axis.at(s), value(s)) for s in listed] or [(axis.at(tick), axis.label(tick)) for tick in axis.ticks]
    return _Scale({value(s): axis.at(s) for s in numbers}, tuple(_apart(marks)), is_ordered=True)


def _by_name(varied: Varied, settings: Sequence[Any], inner: tuple[float, float]) -> _Scale:
    """Values without an order of their own, in that of the file, equally far apart."""
    names = list(dict.fromkeys(value(s) for s in [*(varied.values or ()), *settings]))
    step = (inner[1] - inner[0]) / len(names)
    places = {name: inner[0] + step * (number_ + 0.5) for number_, name in enumerate(names)}
    letters = max(3, int(step / 8.5))
    marks = [(at, _shortened(_last(name, letters), letters)) for name, at in places.items()]
    return _Scale(places, tuple(marks), is_ordered=False)


def _last(name: str, letters: int) -> str:
    """Of a path that is too long its end, which tells it from the others."""
    return name if len(name) <= letters else name.rstrip("/").rpartition("/")[2] or name


def _apart(marks: Sequence[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """The ticks whose labels do not run into the one before; the others without a label."""
    end = -math.inf
    for at, label in marks:
        half = 3.6 * len(label) + 4
        fits = at - half >= end
        end = at + half if fits else end
        yield at, label if fits else ""


def _told(report: SweepReport, row: Row) -> str:
    settings = ", ".join(f"{v.name} {value(row.settings[v.key])}" for v in report.varied)
    came_to = f"{report.metric} {number(row.metric, 4)}" if row.metric is not None else f"{row.state}: {row.reason}"
    return f"{row.name}: {settings}: {came_to}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
