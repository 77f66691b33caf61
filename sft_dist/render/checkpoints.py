"""The listing of a run's checkpoints, for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sft_dist.render.text import prose
from sft_dist.render.wording import count, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sft_dist.checkpoints.listing import Entry, Listing

_COLOURS = {"complete": "green", "damaged": "bold red", "unfinished": "yellow"}


def to_json(listing: Listing) -> dict[str, Any]:
    """The listing with its sum, as it is printed."""
    held = asdict(listing)
    checkpoints = held.pop("entries")
    return held | {"bytes": listing.bytes, "checkpoints": checkpoints}


def to_terminal(listing: Listing, console: Console) -> None:
    """A table that fits into 80 columns, what is wrong with each that is damaged, and what a run would do."""
    from rich.measure import Measurement

    if listing.entries:
        table = _table(listing, gap=2)
        unbounded = console.options.update_width(1000)
        if Measurement.get(console, unbounded, table).maximum > console.width:
            table = _table(listing, gap=1)
        console.print(table)
        console.print()
    for line in _lines(listing):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(listing: Listing, gap: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("trained\ntokens", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("written by")
    table.add_column("when", no_wrap=True)
    table.add_column("held-out\nloss", justify="right", no_wrap=True)
    for entry in listing.entries:
        table.add_row(*_cells(listing, entry))
    return table


def _cells(listing: Listing, entry: Entry) -> list[str]:
    is_sound = entry.state == "complete"
    marks = (">" if is_sound and entry.step == listing.newest else "") + (
        "*" if is_sound and entry.step == listing.best else ""
    )
    by = f"{entry.world_size} x {prose(entry.strategy)}" if entry.strategy else ""
    loss = entry.metrics.get("eval_loss")
    return [
        marks,
        str(entry.step),
        f"[{_COLOURS[entry.state]}]{entry.state}[/]",
        "" if entry.trained_tokens is None else _scaled(entry.trained_tokens, ("", "K", "M", "B", "T")),
        _scaled(entry.bytes, (" B", " kB", " MB", " GB", " TB")),
        by.replace("[", r"\["),
        f"{datetime.fromisoformat(entry.written).astimezone():%Y-%m-%d %H:%M}" if entry.written else "",
        "" if loss is None else number(loss, 4),
    ]


def _lines(listing: Listing) -> list[str]:
    lines = [f"{entry.name}: {prose(entry.fault or '')}" for entry in listing.entries if entry.state == "damaged"]
    unfinished = [entry.name for entry in listing.entries if entry.state == "unfinished"]
    if listing.alive:
        writing = "; what is unfinished is being written" if unfinished else ""
        lines.append(f"{listing.run} is in use by {listing.alive}{writing}")
    elif unfinished:
        lines.append(f"{', '.join(unfinished)}: not written to the end; removed when the run is started again")
    several = max((entry.nodes or 1 for entry in listing.entries), default=1)
    if several > 1:
        lines.append(f"these are the files of one of {several} nodes; a step counts where all of them have it")
    if listing.best is not None:
        best = next(entry for entry in listing.entries if entry.step == listing.best and entry.state == "complete")
        value = best.metrics[listing.metric or ""]
        lines.append(f"* the best {listing.metric}: checkpoint-{listing.best} ({number(value, 4)})")
    return [*lines, _last(listing)]


def _last(listing: Listing) -> str:
    many = f"{count(len(listing.entries), 'checkpoint')}, {count(listing.bytes, 'byte')}"
    if listing.newest is None:
        return f"{many}; there is none that `output.resume=true` could go on from"
    known = "" if listing.contents_read else " where its contents are sound, which were not read"
    return f"{many}; > `output.resume=true` goes on from checkpoint-{listing.newest}{known}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """A number in four characters and a unit of a thousand of the one before."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g}{unit}" if unit != units[0] else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"
