"""The table of a verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_dist.verify.cases import TOLERANCE
from sft_dist.verify.differences import Difference


@dataclass(frozen=True)
class Cell:
    """What came of one case under one strategy: a difference, or why there is none."""

    shape: str
    strategy: str
    case: str
    difference: Difference | None
    why: str = ""

    @property
    def equal(self) -> bool:
        """Whether the numbers are those of one process."""
        return self.difference is not None and self.difference.equal


def to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells with their verdicts."""
    return [asdict(cell) | {"equal": cell.equal} for cell in cells]


def to_terminal(cells: Sequence[Cell]) -> None:
    """One table a shape, and below it what is not equal."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for shape in dict.fromkeys(cell.shape for cell in cells):
        mine = [cell for cell in cells if cell.shape == shape]
        cases = list(dict.fromkeys(cell.case for cell in mine))
        table = Table(
            box=box.ROUNDED, title=f"{shape}: largest relative difference from one process", title_style="bold"
        )
        for name in ("strategy", "loss", "gradient norm", "weights", *cases):
            table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
        for strategy in dict.fromkeys(cell.strategy for cell in mine):
            row = {cell.case: cell for cell in mine if cell.strategy == strategy}
            known = [cell.difference for cell in row.values() if cell.difference is not None]
            table.add_row(
                strategy,
                *(_worst([getattr(d, key) for d in known]) for key in ("loss", "grad_norm", "weights")),
                *(_verdict(row[case]) for case in cases),
            )
        console.print(table)
    for cell in cells:
        if not cell.equal:
            console.print(f"{cell.shape}, {cell.strategy}, {cell.case}: {_told(cell)}", highlight=False)
    wrong = sum(not cell.equal for cell in cells)
    console.print(
        f"{len(cells) - wrong} of {len(cells)} runs have the numbers of one process (to {TOLERANCE:.0e}, fp32)",
        highlight=False,
    )


def _worst(values: Sequence[float]) -> str:
    return f"{max(values):.0e}" if values else "-"


def _verdict(cell: Cell) -> str:
    return "[green]equal[/]" if cell.equal else "[bold red]differs[/]" if cell.difference else "[bold red]failed[/]"


def _told(cell: Cell) -> str:
    found = cell.difference
    if found is None:
        return cell.why
    return f"loss {found.loss:.1e}, gradient norm {found.grad_norm:.1e}, weights {found.weights:.1e}"
