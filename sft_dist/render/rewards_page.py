"""The page of a reward model: big figures, the histogram of margins, the learning curve, pairs at both ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_dist.render.axis import Axis
from sft_dist.render.curve import grid, learning_curve_svg
from sft_dist.render.page import escape, formatted, header, page, pairs
from sft_dist.render.wording import count, number, sides

if TYPE_CHECKING:
    from sft_dist.render.rewards import Histogram, RewardReport, ScoredPair

_WIDTH, _HEIGHT = 720, 280
# Its sides are those of `grid`.
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46
_ABOUT = (
    "Accuracy is the share of held-out pairs whose chosen answer got the higher reward; a coin has 50%. The margin is "
    "the reward of the chosen answer less that of the rejected one."
)


def rewards_page(report: RewardReport) -> str:
    """The whole HTML document; all texts of the report are escaped."""
    about = [("model", report.model), ("data", report.dataset)]
    body = [header(report.title, about), "<h2>Held-out pairs</h2>", *_figures(report)]
    if report.histogram is not None:
        body += ["<h2>Margins</h2>", margins_svg(report.histogram)]
    curve = report.curve and learning_curve_svg(report.curve.train, report.curve.held_out, "loss (nats per pair)")
    if curve:
        body += ["<h2>Learning curve</h2>", curve]
    for title, some in (("The lowest margins", report.worst), ("The highest margins", report.best)):
        if some:
            body += [f"<h2>{title}</h2>", *map(_card, some)]
    if report.facts:
        body += ["<h2>The run</h2>", pairs(report.facts)]
    return page(report.title, body)


def _figures(report: RewardReport) -> list[str]:
    measures = sides(report.before, report.after, "measured")
    if not measures:
        return ['<p class="none">Not measured.</p>']
    figures = [_figure(name, f"{measure.accuracy:.1%}") for name, measure in measures]
    if report.before and report.after:
        moved = report.after.accuracy - report.before.accuracy
        style = " good" if moved > 0 else " bad" if moved < 0 else ""
        figures.insert(1, '<span class="arrow" aria-label="to">→</span>')
        figures.append(_figure("accuracy", f"{100 * moved:+.1f} points", style))
    facts = [
        ("loss", " → ".join(number(measure.loss, 4) for _, measure in measures)),
        ("mean margin", " → ".join(number(measure.margin, 3) for _, measure in measures)),
        ("rewards", " → ".join(f"{number(m.mean_reward, 3)} ± {number(m.reward_std, 3)}" for _, m in measures)),
        ("measured on", count(measures[-1][1].pairs, "held-out pair")),
    ]
    return [f'<div class="figures">{"".join(figures)}</div>', f'<p class="soft">{_ABOUT}</p>', pairs(facts)]


def _figure(name: str, value: str, style: str = "") -> str:
    return f'<div class="figure{style}"><span class="name">{name}</span><span class="value">{value}</span></div>'


def margins_svg(held: Histogram) -> str:
    """Pairs by their margin, before and after in bars side by side, as inline SVG; a line marks zero."""
    shown = sides(held.before, held.after, "held out")
    most = max((max(counts) for _, counts in shown), default=1) or 1
    x = Axis.over(held.edges[0], held.edges[-1], _LEFT, _WIDTH - _RIGHT, 8)
    y = Axis.over(0, most, _HEIGHT - _BOTTOM, _TOP, 4, whole=True, rounded=True)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_caption(held))}">',
        *grid(x, y, _HEIGHT, "margin", "held-out pairs"),
    ]
    colours = ["var(--held-line, #b4530a)", "var(--train-line, #2a62c4)"][-len(shown) :]
    for number_of, ((_, counts), colour) in enumerate(zip(shown, colours, strict=True)):
        for low, high, pairs_in in zip(held.edges, held.edges[1:], counts, strict=False):
            if pairs_in:
                left, right = x.at(low), x.at(high)
                width = (right - left - 2) / len(shown)
                top = y.at(pairs_in)
                parts.append(
                    f'<rect x="{left + 1 + number_of * width:.1f}" y="{top:.1f}" width="{max(width, 1):.1f}" '
                    f'height="{_HEIGHT - _BOTTOM - top:.1f}" style="fill:{colour}"/>'
                )
    zero = x.at(0)
    parts.append(
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP - 8}" y2="{_HEIGHT - _BOTTOM}" '
        'style="stroke:var(--ink, #1c1e21);stroke-width:1.5;stroke-dasharray:5 4"/>'
    )
    parts += _legend([name for name, _ in shown], colours)
    return "\n".join([*parts, "</svg>"])


def _legend(names: list[str], colours: list[str]) -> list[str]:
    parts = []
    for at, (name, colour) in enumerate(reversed(list(zip(names, colours, strict=True)))):
        left = _WIDTH - _RIGHT - 92 * (at + 1)
        parts.append(f'<rect x="{left}" y="6" width="20" height="11" style="fill:{colour}"/>')
        parts.append(f'<text x="{left + 27}" y="16" style="fill:var(--ink, #1c1e21)">{name}</text>')
    return parts


def _caption(held: Histogram) -> str:
    told = [
        f"{name}, {sum(c for c, low in zip(counts, held.edges, strict=False) if low >= 0):,} of {sum(counts):,} pairs "
        "have no margin below zero"
        for name, counts in sides(held.before, held.after, "measured")
    ]
    return "Histogram of margins: " + "; ".join(told)


def _card(pair: ScoredPair) -> str:
    turns = "".join(
        f'<div class="turn"><span class="role">{escape(role)}</span>{formatted(content) or _NONE}</div>'
        for role, content in pair.prompt
    )
    columns = [_column("chosen", 0, pair.chosen, pair), _column("rejected", 1, pair.rejected, pair)]
    return (
        f'<section class="card"><div class="head"><h3>margin {number(pair.margin, 3)}</h3>'
        f'<span class="soft">{escape(pair.where)}</span></div>'
        f'<div class="prompt">{turns}</div><div class="answers single">{"".join(columns)}</div></section>'
    )


def _column(name: str, at: int, text: str, pair: ScoredPair) -> str:
    rewards = " → ".join(number(both[at], 3) for _, both in sides(pair.before, pair.after, ""))
    return f'<div class="answer"><span class="role">{name}, reward {rewards}</span>{formatted(text) or _NONE}</div>'


_NONE = '<p class="none">empty</p>'
