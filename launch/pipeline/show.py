"""The graph of a pipeline in the terminal: each stage below what it needs, with its state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.pipeline.stage import Pipeline, shown
from launch.pipeline.view import Row, State
from sft_dist.render.wording import duration

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "failed": "bold red", "skipped": "red",
            "stale": "yellow", "stopped": "yellow", "pending": "dim"}  # fmt: skip
_MARKS: dict[State, str] = {"done": "✔", "running": "▶", "queued": "◦", "stopped": "‖", "stale": "↻", "failed": "✘",
                            "skipped": "–", "pending": "·"}  # fmt: skip


def to_terminal(pipeline: Pipeline, rows: Sequence[Row], console: Console) -> None:
    """The tree as a table, and a line that counts the states."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("stage", "kind", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("step", no_wrap=True, justify="right")
    table.add_column("time", no_wrap=True, justify="right")
    table.add_column("", overflow="fold")
    for guide, row in _tree(rows):
        others = [need for need in row.needs if need != _parent(row, rows)]
        about = row.about + (f"{'; ' * bool(row.about)}also needs {', '.join(others)}" if others else "")
        time = "" if row.seconds is None else duration(row.seconds)
        table.add_row(
            Text(guide + row.name),
            row.kind,
            f"[{_COLOURS[row.state]}]{_MARKS[row.state]} {row.state}[/]",
            row.step,
            time,
            escape(about),
        )
    console.print(table)
    console.print()
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{counts[name]} {name}" for name in _MARKS if counts[name])
    console.print(f"{shown(pipeline.root)}: {told}", highlight=False, markup=False, soft_wrap=True)


def _tree(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Each row once, below the last of the stages that it needs, with the lines that lead to it."""
    parent = {row.name: _parent(row, rows) for row in rows}
    found: list[tuple[str, Row]] = []

    def add(row: Row, lead: str, guide: str) -> None:
        found.append((guide, row))
        below = [each for each in rows if parent[each.name] == row.name]
        for number, each in enumerate(below, 1):
            last = number == len(below)
            add(each, lead + ("   " if last else "│  "), lead + ("└─ " if last else "├─ "))

    for row in rows:
        if parent[row.name] is None:
            add(row, "", "")
    return found


def _parent(row: Row, rows: Sequence[Row]) -> str | None:
    """The latest of what a stage needs, so that all of it stands above the stage; None where it needs nothing."""
    order = [each.name for each in rows]
    return max(row.needs, key=order.index, default=None)
