"""The picture of a length report: two histograms above one axis, as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft_dist.render.axis import Axis
from sft_dist.render.page import escape
from sft_dist.render.wording import count

if TYPE_CHECKING:
    from sft_dist.render.lengths import Figures, LengthReport

_WIDTH, _HEIGHT = 760, 520
_LEFT, _RIGHT = 84, 34
_PANEL = 158
_TOPS = (112, 316)  # of the panels

# Plain colours and a background of its own: programs that show pictures know no variables, and pages have any colour.
_STYLE = """
  text { font: 13px system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; fill: #1c1e21; }
  .paper { fill: #fbfbf9; } .title { font-size: 17px; font-weight: 650; } .name { font-weight: 650; }
  .soft { fill: #5b626b; } .line { stroke: #dfe1e4; } .floor { stroke: #5b626b; }
  .all { fill: #2a62c4; } .trained { fill: #14692f; }
  .limit { stroke: #b4530a; stroke-width: 1.5; stroke-dasharray: 5 4; } .limit-ink { fill: #b4530a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e7e9; } .paper { fill: #16181b; } .soft { fill: #a0a7b0; } .line { stroke: #363b42; }
    .floor { stroke: #a0a7b0; } .all { fill: #7ba9f5; } .trained { fill: #6fd08c; }
    .limit { stroke: #f0a35e; } .limit-ink { fill: #f0a35e; }
  }
"""


def lengths_svg(report: LengthReport) -> str:
    """The picture; texts of the report are escaped."""
    source = report.source
    x = _axis(report.edges)
    most = max(*report.token_bins, *report.trained_bins)
    about = _shortened(f"{source.data}, as {source.model} reads it")
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(_caption(report))}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="32">Tokens per row</text>',
        f'<text class="soft" x="{_LEFT}" y="54">{escape(about)}: {count(report.rows, "row")}</text>',
        *_panel(report.edges, report.token_bins, x, most, _TOPS[0], "all", _heading("all tokens", report.tokens)),
        *_panel(
            report.edges, report.trained_bins, x, most, _TOPS[1], "trained", _heading("trained tokens", report.trained)
        ),
        *_limit(report, x),
        *_ticks(x),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axis(edges: tuple[int, ...]) -> Axis:
    """Ticks are edges of bins, so that a bar begins at a number that can be read."""
    stride = -(-(len(edges) - 1) // 8)
    ticks = tuple(float(edge) for edge in edges[::stride])
    return Axis(0, edges[-1], _LEFT, _WIDTH - _RIGHT, ticks, max(edges[1] - edges[0], 1))


def _panel(
    edges: tuple[int, ...],
    bins: tuple[int, ...],
    x: Axis,
    most: int,
    top: int,
    style: str,
    heading: tuple[str, str],
) -> Iterator[str]:
    floor = top + _PANEL
    y = Axis.over(0, most, floor, top, 4, whole=True, rounded=True)
    name, told = heading
    yield f'<text x="{_LEFT}" y="{top - 14}"><tspan class="name {style}">{name}</tspan>  {told}</text>'
    for tick in y.ticks:
        at = y.at(tick)
        yield f'<line class="line" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="soft" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_compact(tick)}</text>'
    for low, high, rows in zip(edges, edges[1:], bins, strict=False):
        if rows:
            left, right, height = x.at(low) + 1, x.at(high) - 1, max(floor - y.at(rows), 1)
            yield (
                f'<rect class="{style}" x="{left:.1f}" y="{floor - height:.1f}" width="{max(right - left, 1):.1f}" '
                f'height="{height:.1f}"><title>{low + 1:,}-{high:,} tokens: {rows:,} rows</title></rect>'
            )
    yield f'<line class="floor" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    middle = top + _PANEL / 2
    yield f'<text class="soft" transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">rows</text>'


def _ticks(x: Axis) -> Iterator[str]:
    floor = _TOPS[1] + _PANEL
    for tick in x.ticks:
        at = x.at(tick)
        for top in _TOPS:
            yield f'<line class="floor" x1="{at:.1f}" x2="{at:.1f}" y1="{top + _PANEL}" y2="{top + _PANEL + 4}"/>'
        yield f'<text class="soft" x="{at:.1f}" y="{floor + 20}" text-anchor="middle">{x.label(tick)}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text class="soft" x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">tokens per row</text>'


def _limit(report: LengthReport, x: Axis) -> Iterator[str]:
    limit = report.source.max_length
    if limit is None or limit > report.edges[-1]:
        return
    at = x.at(limit)
    for top in _TOPS:
        yield f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 28}" y2="{top + _PANEL}"/>'
    yield f'<text class="limit-ink" x="{at:.1f}" y="{_TOPS[0] - 33}" text-anchor="end">max_length {limit:,}</text>'


def _heading(name: str, figures: Figures) -> tuple[str, str]:
    usual = f"median {figures.median:,.0f}, mean {figures.mean:,.0f}"
    return name, f"{usual}, 99% up to {figures.p99:,}, total {_compact(figures.total)}"


def _compact(number: float) -> str:
    """`584,194`, `2.5 M`, `123.7 G`: what a label has room for."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.4g} {letter}"
    return f"{number:,.0f}"


def _shortened(text: str, most: int = 76) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _caption(report: LengthReport) -> str:
    told = (_heading("all tokens", report.tokens), _heading("trained tokens", report.trained))
    return f"Tokens per row of {report.rows:,} rows: " + "; ".join(": ".join(pair) for pair in told)
