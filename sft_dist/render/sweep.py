"""The trials of a sweep for the terminal: one table, the best first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_dist.render.text import prose
from sft_dist.render.wording import count, duration, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS = {"done": "green", "failed": "bold red", "unfinished": "yellow", "running": "cyan", "queued": "blue",
            "waiting": "dim"}  # fmt: skip
_LONGEST = 26
_MOST_TOLD = 8
_ORDER = ("done", "running", "queued", "unfinished", "failed", "waiting")


@dataclass(frozen=True)
class Varied:
    """A key that is varied. `values`: those that were listed, None for a range; `log`: a range over factors."""

    key: str
    name: str
    values: tuple[Any, ...] | None
    log: bool


@dataclass(frozen=True)
class Row:
    """A trial. `metric` is None where it has none; `reason`: why it is not done, in a word; `said`: in its own."""

    name: str
    settings: Mapping[str, Any]
    metric: float | None
    state: str
    reason: str | None
    tokens_per_second: float | None
    steps: int | None
    seconds: float | None
    folder: str
    said: str | None = None


@dataclass(frozen=True)
class SweepReport:
    """The trials of a sweep, the best first."""

    name: str
    metric: str
    greater_is_better: bool
    varied: tuple[Varied, ...]
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The first of those that have the metric."""
        return self.rows[0] if self.rows and self.rows[0].metric is not None else None

    @property
    def direction(self) -> str:
        """`lower is better`, or higher."""
        return f"{'higher' if self.greater_is_better else 'lower'} is better"


def to_terminal(report: SweepReport, console: Console, results: bool = True) -> None:
    """Print the table and a line that sums it up. `results`: with what the runs came to, not only what they are."""
    from rich.measure import Measurement
    from rich.text import Text

    from sft_dist.render.text import tolerate_encoding

    tolerate_encoding(console)
    table = _table(report, results)
    if not console.is_terminal:
        # A file is as wide as it has to be.
        console.width = max(console.width, Measurement.get(console, console.options.update_width(1000), table).maximum)
    console.print(table)
    for line in [summary_line(report, results), *(_notes(report) if results else ())]:
        console.print(Text(prose(line)), soft_wrap=True)


def summary_line(report: SweepReport, results: bool = True) -> str:
    """`6 trials: 5 done, 1 failed; * the best eval_loss (lower is better): trial-002 with learning_rate 2e-05`."""
    states = [row.state for row in report.rows]
    parts = [f"{states.count(state)} {state}" for state in _ORDER if state in states]
    line = f"{count(len(states), 'trial')}: {', '.join(parts)}"
    if results and (best := report.best) is not None and best.metric is not None:
        settings = ", ".join(f"{v.name} {value(best.settings[v.key])}" for v in report.varied)
        line += f"; * the best {report.metric} ({report.direction}): {number(best.metric, 4)}, {best.name}, {settings}"
    return line


def _notes(report: SweepReport) -> list[str]:
    failed = [f"{row.name}: {row.said}" for row in report.rows if row.said]
    more = [f"and {len(failed) - _MOST_TOLD} more that failed"] if len(failed) > _MOST_TOLD else []
    return [*edge_lines(report), *failed[:_MOST_TOLD], *more]


def edge_lines(report: SweepReport) -> list[str]:
    """Where the best of at least three numbers is the least or the largest of them: a better one may lie beyond."""
    best = report.best
    lines = []
    for varied in report.varied if best is not None else ():
        numbers = [v for v in varied.values or () if isinstance(v, int | float) and not isinstance(v, bool)]
        mine = best.settings[varied.key] if best is not None else None
        if len(numbers) >= 3 and len(numbers) == len(varied.values or ()) and mine in (min(numbers), max(numbers)):
            which, beyond = ("smallest", "below") if mine == min(numbers) else ("largest", "above")
            lines.append(f"{varied.name}: the best, {value(mine)}, is the {which} of {len(numbers)}; a better "
                         f"one may lie {beyond}")  # fmt: skip
    return lines


def value(setting: Any) -> str:
    """A setting for people: `1e-05`, `true`, `a.jsonl`."""
    if isinstance(setting, float):
        return f"{setting:.6g}"
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)


def _table(report: SweepReport, results: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("trial", no_wrap=True)
    for varied in report.varied:
        table.add_column(_broken(varied.name), justify="right", no_wrap=True)
    if results:
        table.add_column(_broken(report.metric), justify="right", no_wrap=True)
        for name in ("tokens/s", "steps", "time"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in report.rows:
        style = "bold" if results and row is report.best else ""
        cells = ["*" if style else "", row.name, *(_text(row.settings[v.key]) for v in report.varied)]
        cells += _results(row) if results else []
        state = Text(row.state, _COLOURS.get(row.state, ""))
        state.append(f": {prose(row.reason)}" if row.reason else "", "default")
        table.add_row(*(Text(cell, style) for cell in cells), state)
    return table


def _results(row: Row) -> list[str]:
    return [
        "" if row.metric is None else number(row.metric, 4),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "" if row.steps is None else f"{row.steps:,}",
        "" if row.seconds is None else duration(row.seconds),
    ]


def _text(setting: Any) -> str:
    # The end of a path or a list tells it from the others.
    text = prose(value(setting)).replace("\n", " ")
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _broken(name: str) -> str:
    """A heading in lines of at most about twelve letters, broken at its underscores."""
    lines = [""]
    for part in name.replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > 13:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
