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
    from rich.table import Table

_COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "failed": "bold red", "skipped": "red",
            "stale": "yellow", "stopped": "yellow", "pending": "dim"}  # fmt: skip
_MARKS: dict[State, str] = {"done": "✔", "running": "▶", "queued": "◦", "stopped": "‖", "stale": "↻", "failed": "✘",
                            "skipped": "–", "pending": "·"}  # fmt: skip


def to_terminal(pipeline: Pipeline, rows: Sequence[Row], console: Console) -> None:
    """The tree as a table, why stages failed, and a line that counts the states."""
    console.print(_table(rows))
    console.print()
    for row in rows:
        if row.state == "failed":
            log = pipeline.dir.log(row.name)
            place = f" (log: {shown(log)})" if log.exists() else ""
            console.print(f"{row.name}: {row.about}{place}", highlight=False, markup=False, soft_wrap=True)
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{counts[name]} {name}" for name in _MARKS if counts[name])
    console.print(f"{shown(pipeline.root)}: {told}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("stage", "kind", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "time"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("output", overflow="fold")
    parent = _parents(rows)
    for guide, row in _tree(rows):
        state = Text(f"{_MARKS[row.state]} {row.state}", style=_COLOURS[row.state])
        time = "" if row.seconds is None else duration(row.seconds)
        table.add_row(Text(guide + row.name), row.kind, state, row.step, time, Text(_about(row, parent[row.name])))
    return table


def _about(row: Row, parent: str | None) -> str:
    others = [need for need in row.needs if need != parent]
    # A reason may be a whole sentence, which would tear the tree apart.
    words = "see below" if row.state == "failed" else row.about
    return "; ".join(filter(None, [words, f"also needs {', '.join(others)}" if others else ""]))


def _tree(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Each row once, with the lines that lead to it from its parent."""
    parent = _parents(rows)
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


def _parents(rows: Sequence[Row]) -> dict[str, str | None]:
    """The stage that each stands below: of those that it needs the one that is shown last."""
    parent: dict[str, str | None] = {}

    def visit(row: Row, above: str | None) -> None:
        parent[row.name] = above
        for each in rows:
            if row.name in each.needs and each.name not in parent and set(each.needs) <= set(parent):
                visit(each, row.name)

    for row in rows:
        if not row.needs:
            visit(row, None)
    return parent
