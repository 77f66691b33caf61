"""A reward model before and after training: accuracy and margins on held-out pairs, and the pairs at both ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft_dist.render.axis import nice
from sft_dist.render.curve import Curve
from sft_dist.render.rewards_page import rewards_page
from sft_dist.render.text import prose, reveal, tolerate_encoding
from sft_dist.render.wording import count, number, sides

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_BINS = 16
_BAR = 30
_SHORT = 200  # characters of a text in the terminal


@dataclass(frozen=True)
class RewardMeasure:
    """Means over held-out pairs: `accuracy` is the share whose chosen side has the higher reward, `margin` the
    difference of the two rewards. `reward_std`: over all rewards."""

    loss: float
    accuracy: float
    margin: float
    mean_reward: float
    reward_std: float
    pairs: int


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair with the rewards (chosen, rejected) that it was given. `prompt`: (role, content) turns."""

    where: str
    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    before: tuple[float, float] | None
    after: tuple[float, float] | None

    @property
    def margin(self) -> float:
        """By how much the chosen side is ahead, at last."""
        chosen, rejected = self.after or self.before or (math.nan, math.nan)
        return chosen - rejected


@dataclass(frozen=True)
class Histogram:
    """Pairs by their margin: bin i counts margins from `edges[i]` to below `edges[i + 1]`, the last one's end too."""

    edges: tuple[float, ...]
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


@dataclass(frozen=True)
class RewardReport:
    """What a run came to. `worst` and `best`: pairs of the least and the largest margin, from the outside in."""

    title: str
    model: str
    dataset: str
    before: RewardMeasure | None
    after: RewardMeasure | None
    histogram: Histogram | None
    worst: tuple[ScoredPair, ...]
    best: tuple[ScoredPair, ...]
    facts: tuple[tuple[str, str], ...]
    curve: Curve | None = None


def histogram(before: NDArray[np.float64] | None, after: NDArray[np.float64] | None) -> Histogram | None:
    """About `_BINS` bins, as round as may be and with an edge at zero, over the finite margins of both."""
    given = [margins[np.isfinite(margins)] for margins in (before, after) if margins is not None]
    every = np.concatenate(given) if given else np.zeros(0)
    if not len(every):
        return None
    low, high = min(float(every.min()), 0.0), max(float(every.max()), 0.0)
    step = nice(max(high - low, 1e-6) / _BINS)
    first, last = math.floor(low / step), math.ceil(high / step)
    edges = np.arange(first, max(last, first + 1) + 1) * step

    def counts(margins: NDArray[np.float64] | None) -> tuple[int, ...] | None:
        if margins is None:
            return None
        return tuple(np.histogram(margins[np.isfinite(margins)], edges)[0].tolist())

    return Histogram(tuple(edges.tolist()), counts(before), counts(after))


def to_html(report: RewardReport) -> str:
    """The report as a page, with the pairs at both ends whole."""
    return rewards_page(report)


def to_terminal(report: RewardReport, console: Console, pairs: int = 1) -> None:
    """Print the report: figures, the histogram, the outermost `pairs` of each end shortened, facts."""
    from rich.text import Text

    tolerate_encoding(console)
    console.print()
    console.print(Text(reveal(report.title), "bold"))
    console.print(Text(reveal(f"{report.model} on {report.dataset}"), "dim"))
    console.print()
    measures = sides(report.before, report.after, "measured")
    console.print(_table(measures) if measures else Text("Held-out pairs: not measured", "dim"))
    if report.histogram is not None:
        console.print()
        for line in _bars(report.histogram):
            console.print(line, soft_wrap=True)
    for name, some in (("lowest margin", report.worst[:pairs]), ("highest margin", report.best[:pairs])):
        for pair in some:
            console.print()
            for line in _pair(name, pair):
                console.print(line)
    if report.facts:
        console.print()
        width = max(len(name) for name, _ in report.facts)
        for name, value in report.facts:
            console.print(Text.assemble((f"{reveal(name):<{width}}  ", "dim"), reveal(value)), soft_wrap=True)


def _table(measures: Sequence[tuple[str, RewardMeasure]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column(f"{count(measures[-1][1].pairs, 'held-out pair')}")
    for name, _ in measures:
        table.add_column(name, justify="right")
    table.add_row(Text("accuracy", "bold"), *(Text(f"{measure.accuracy:.1%}", "bold") for _, measure in measures))
    table.add_row("loss", *(number(measure.loss, 4) for _, measure in measures))
    table.add_row("margin", *(number(measure.margin, 3) for _, measure in measures))
    table.add_row("reward", *(f"{number(m.mean_reward, 3)} ± {number(m.reward_std, 3)}" for _, m in measures))
    return table


def _bars(held: Histogram) -> list[Text]:
    from rich.text import Text

    digits = max(0, -math.floor(math.log10(held.edges[1] - held.edges[0]) + 1e-9))
    labels = [f"{low:.{digits}f} to {high:.{digits}f}" for low, high in zip(held.edges, held.edges[1:], strict=False)]
    shown = sides(held.before, held.after, "measured")
    most = max(max(counts) for _, counts in shown) or 1
    width = max(map(len, labels))
    lines = [Text(f"{'margin':>{width}}  " + "".join(f"{name:<{_BAR + 8}}" for name, _ in shown).rstrip(), "bold")]
    for at, label in enumerate(labels):
        line = Text(f"{label:>{width}}  ")
        for _, counts in shown:
            bar = "█" * max(round(counts[at] / most * _BAR), int(counts[at] > 0))
            line.append(bar, "green" if held.edges[at] >= 0 else "red")
            line.append(f"{f' {counts[at]:,}' if counts[at] else '':<{_BAR + 8 - len(bar)}}")
        line.rstrip()
        lines.append(line)
    return lines


def _pair(name: str, pair: ScoredPair) -> list[Text]:
    from rich.text import Text

    question = pair.prompt[-1][1] if pair.prompt else ""
    lines = [
        Text(f"{name}: {number(pair.margin, 3)}, {reveal(pair.where)}", "bold"),
        Text(f"prompt    {_short(question)}"),
    ]
    for at, (side, text) in enumerate((("chosen", pair.chosen), ("rejected", pair.rejected))):
        rewards = " → ".join(number(both[at], 3) for _, both in sides(pair.before, pair.after, ""))
        lines.append(Text.assemble(f"{side:<9} ", (f"[{rewards}] ", "bold"), _short(text)))
    return lines


def _short(text: str) -> str:
    line = " ".join(prose(text).split())
    return line if len(line) <= _SHORT else f"{line[:_SHORT]}…"
