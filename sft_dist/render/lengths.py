"""How long the rows of a data set are: figures and histograms of all tokens and of trained tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft_dist.render.axis import nice
from sft_dist.render.lengths_page import lengths_svg
from sft_dist.render.text import reveal, tolerate_encoding
from sft_dist.render.wording import count, share

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Ints = NDArray[np.int64]

_BINS = 16
_WIDEST = 100  # cells of the terminal; longer bars tell no more
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Figures:
    """Tokens per row. `p90` and `p99`: so many hundredths of the rows have as many tokens at most."""

    least: int
    median: float
    mean: float
    p90: int
    p99: int
    most: int
    total: int

    @classmethod
    def of(cls, tokens: Ints) -> Figures:
        p90, p99 = np.percentile(tokens, [90, 99], method="inverted_cdf")
        return cls(
            least=int(tokens.min()),
            median=float(np.median(tokens)),
            mean=float(tokens.mean()),
            p90=int(p90),
            p99=int(p99),
            most=int(tokens.max()),
            total=int(tokens.sum()),
        )


@dataclass(frozen=True)
class Source:
    """What the rows come from, and what became of its records.

    `facts`: further lines, each a name and what it says. `max_length`: where rows end, in tokens; None: nowhere.
    """

    model: str
    data: str
    max_length: int | None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LengthReport:
    """Figures and histograms of rows. Bin i counts rows of more than `edges[i]` and at most `edges[i + 1]` tokens."""

    source: Source
    rows: int
    at_limit: int
    tokens: Figures
    trained: Figures
    edges: tuple[int, ...]
    token_bins: tuple[int, ...]
    trained_bins: tuple[int, ...]

    @classmethod
    def of(cls, tokens: ArrayLike, trained: ArrayLike, source: Source) -> LengthReport:
        """The report of rows of so many `tokens`, of which so many are `trained`, each (rows,) and at least 1.

        Raises ValueError where there is no row, or the two are not of one length.
        """
        every, learnt = np.asarray(tokens, np.int64), np.asarray(trained, np.int64)
        if not every.size or every.shape != learnt.shape or every.ndim != 1:
            raise ValueError(f"a report is of rows, at least one; not of {every.shape} and {learnt.shape}")
        edges = bin_edges(int(every.max()), source.max_length)
        return cls(
            source=source,
            rows=len(every),
            at_limit=0 if source.max_length is None else int((every >= source.max_length).sum()),
            tokens=Figures.of(every),
            trained=Figures.of(learnt),
            edges=edges,
            token_bins=_counted(every, edges),
            trained_bins=_counted(learnt, edges),
        )


def bin_edges(longest: int, max_length: int | None) -> tuple[int, ...]:
    """Edges of about 16 bins from 0, as round as may be; the last is `max_length` or, far below it, beyond `longest`.

    A sixteenth of the end where that is a whole number, as lengths tend to be powers of two, else 1, 2 or 5 times a
    power of ten.
    """
    near = max_length is not None and max_length <= 4 * longest
    end = max_length if near and max_length is not None else longest
    width = end // _BINS if end % _BINS == 0 and near else max(1, round(nice(end / _BINS)))
    edges = [*range(0, end, width), end if near else math.ceil(end / width) * width]
    # Rows that were never cut, such as held-out ones of another limit, still have a bin.
    return (*edges, longest) if longest > edges[-1] else tuple(edges)


def _counted(lengths: Ints, edges: tuple[int, ...]) -> tuple[int, ...]:
    places = np.searchsorted(np.asarray(edges[1:]), lengths, side="left")
    return tuple(np.bincount(places, minlength=len(edges) - 1).tolist())


def to_svg(report: LengthReport) -> str:
    """The report as a picture that stands alone, light or dark as the reader's screen is."""
    return lengths_svg(report)


def to_terminal(report: LengthReport, console: Console) -> None:
    """Print the report: facts, a table of figures, and the two histograms side by side on one scale."""
    from rich.text import Text

    tolerate_encoding(console)
    source = report.source
    for name, value in (("model", source.model), ("data", source.data), *source.facts):
        console.print(Text.assemble((f"{reveal(name):<10}", "dim"), reveal(value)), soft_wrap=True)
    console.print()
    for line in _figures(report):
        console.print(line, soft_wrap=True)
    console.print()
    for line in _histogram(report, min(console.width, _WIDEST), console.encoding.startswith("utf")):
        console.print(line, soft_wrap=True)
    if told := about_limit(report):
        console.print(Text(told, "dim"), soft_wrap=True)


def about_limit(report: LengthReport) -> str:
    """How many rows are as long as they may be; empty where nothing limits them."""
    limit = report.source.max_length
    if limit is None:
        return ""
    if not report.at_limit:
        return f"max_length is {limit:,}: every row is shorter."
    told = f"{count(report.at_limit, 'row')} ({share(report.at_limit, report.rows)})"
    return f"max_length is {limit:,}: {told} {'is' if report.at_limit == 1 else 'are'} as long."


def _figures(report: LengthReport) -> list[Text]:
    from rich.text import Text

    titles = ("min", "median", "mean", "90%", "99%", "max", "total")
    lines = [Text("tokens per row" + "".join(f"{t:>9}" for t in titles[:-1]) + f"{titles[-1]:>12}", "bold")]
    for name, f in (("all", report.tokens), ("trained", report.trained)):
        figures = (f.least, f.median, f.mean, f.p90, f.p99, f.most)
        cells = "".join(f"{v:>9,.1f}" if isinstance(v, float) else f"{v:>9,}" for v in figures)
        lines.append(Text(f"{name:<14}{cells}{f.total:>12,}"))
    return lines


def _histogram(report: LengthReport, width: int, blocks: bool) -> list[Text]:
    from rich.text import Text

    labels = [f"{low + 1:,}-{high:,}" for low, high in zip(report.edges, report.edges[1:], strict=False)]
    first = max(len("tokens"), *map(len, labels))
    most = max(*report.token_bins, *report.trained_bins)
    number = len(f"{most:,}")
    bar = max((width - first) // 2 - number - 3, 4)
    column = bar + number + 1
    head = f"{'tokens':>{first}}  {'rows, by all tokens':<{column}}  {'rows, by trained tokens':<{column}}"
    lines = [Text(head.rstrip()[:width], "bold")]
    for label, every, learnt in zip(labels, report.token_bins, report.trained_bins, strict=True):
        line = Text(f"{label:>{first}}  ")
        for rows, style in ((every, "blue"), (learnt, "green")):
            drawn = _bar(rows / most * bar, bool(rows), blocks)
            line.append(drawn, style)
            line.append(f"{f' {rows:,}' if rows else '':<{column - len(drawn)}}  ")
        line.rstrip()
        lines.append(line)
    return lines


def _bar(cells: float, some: bool, blocks: bool) -> str:
    """A bar so many cells long; at least an eighth of one for `some`, so that a single row shows."""
    if not blocks:
        return "#" * max(round(cells), int(some))
    eighths = max(round(8 * cells), int(some))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
