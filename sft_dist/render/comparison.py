"""A model before and after training: held-out perplexity, answers side by side, facts of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sft_dist.render.comparison_page import comparison_page
from sft_dist.render.curve import Curve
from sft_dist.render.text import prose, reveal, tolerate_encoding
from sft_dist.render.wording import change, count, difference, measured_on, number, sides

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDEST = 160
_SIDE_BY_SIDE = 60
_ANSWER_LINES = 12
_PROMPT_LINES = 3
_VERDICT_STYLE = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Measure:
    """A held-out measurement.

    `loss`: mean over the response tokens, in nats. `perplexity`: its exponential. `tokens`: response tokens.
    """

    perplexity: float
    loss: float
    tokens: int
    records: int


@dataclass(frozen=True)
class Figure:
    """A number before and after training; None: not measured. `better`: which way is, where one of them is."""

    name: str
    before: float | None
    after: float | None
    better: Literal["higher", "lower"] | None = None
    digits: int = 3

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or nothing where that cannot be said."""
        if self.better is None or self.before is None or self.after is None or self.before == self.after:
            return ""
        return "better" if (self.after > self.before) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, as (role, content) turns, with the data's own answer and the model's; None: not asked."""

    prompt: tuple[tuple[str, str], ...]
    reference: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Comparison:
    """What a run came to. A fact named `answers` is taken for the place where the whole answers lie.

    `lead`: what stands first in the place of perplexity, which is then told beside the other `figures`.
    """

    title: str
    model: str
    dataset: str
    before: Measure | None
    after: Measure | None
    answers: tuple[Answer, ...]
    facts: tuple[tuple[str, str], ...]
    curve: Curve | None = None
    curve_unit: str = "loss (nats per token)"
    figures: tuple[Figure, ...] = ()
    lead: Figure | None = None


def to_html(comparison: Comparison) -> str:
    """The comparison as a page, with every answer whole."""
    return comparison_page(comparison)


def to_terminal(comparison: Comparison, console: Console, max_answers: int = 3) -> None:
    """Print the comparison in the console's width: perplexity, the first `max_answers` answers, facts.

    Long answers are shortened to 12 lines. Facts are never wrapped, so that paths can be copied.
    """
    from rich.text import Text

    tolerate_encoding(console)
    console.print()
    console.print(Text(reveal(comparison.title), "bold"))
    console.print(Text(reveal(f"{comparison.model} on {comparison.dataset}"), "dim"))
    console.print()
    _print_measures(comparison, console)
    shown = comparison.answers[:max_answers]
    shortened = False
    for at, answer in enumerate(shown, start=1):
        console.print()
        shortened |= _print_answer(answer, f"Answer {at} of {len(comparison.answers)}", console)
    _print_rest(comparison, len(comparison.answers) - len(shown), shortened, console)
    if comparison.facts:
        console.print()
        width = max(len(name) for name, _ in comparison.facts)
        for name, value in comparison.facts:
            row = Text.assemble((f"{reveal(name):<{width}}  ", "dim"), reveal(value))
            console.print(row, soft_wrap=True)


def _print_measures(comparison: Comparison, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    measures = sides(comparison.before, comparison.after, "measured")
    if not measures:
        console.print(Text("Held-out perplexity: not measured", "dim"))
        return
    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column("held out")
    for name, _ in measures:
        table.add_column(name, justify="right")
    perplexity = [Text(number(measure.perplexity), "bold") for _, measure in measures]
    loss = [Text(number(measure.loss, 3)) for _, measure in measures]
    if comparison.before and comparison.after:
        table.add_column("change", justify="right")
        text, verdict = change(comparison.before.perplexity, comparison.after.perplexity)
        perplexity.append(Text(f"{text} {verdict}".strip(), f"bold {_VERDICT_STYLE.get(verdict, '')}"))
        loss.append(Text(difference(comparison.before.loss, comparison.after.loss)))
    both = bool(comparison.before), bool(comparison.after)
    if comparison.lead is None:
        table.add_row(Text("perplexity", "bold"), *perplexity)
        table.add_row(Text("loss"), *loss)
    else:
        table.add_row(Text(comparison.lead.name, "bold"), *_figure_cells(comparison.lead, *both))
    for figure in comparison.figures:
        table.add_row(Text(figure.name), *_figure_cells(figure, *both))
    console.print(table)
    console.print(Text(measured_on(comparison.before, comparison.after, comparison.lead is None), "dim"))


def _figure_cells(figure: Figure, before: bool, after: bool) -> list[Text]:
    from rich.text import Text

    values = [figure.before] * before + [figure.after] * after
    cells = [Text("" if value is None else number(value, figure.digits)) for value in values]
    if before and after:
        known = figure.before is not None and figure.after is not None
        moved = f"{(figure.after or 0) - (figure.before or 0):+.{figure.digits}f}" if known else ""
        cells.append(Text(f"{moved} {figure.verdict}".strip(), _VERDICT_STYLE.get(figure.verdict, "")))
    return cells


def _print_answer(answer: Answer, title: str, console: Console) -> bool:
    """Print one answer; true where something of it was left out."""
    from rich.text import Text

    width = min(console.width, _WIDEST)
    role, question = answer.prompt[-1] if answer.prompt else ("", "")
    earlier = len(answer.prompt) - 1
    note = f", after {count(earlier, 'earlier turn')}" if earlier > 0 else ""
    console.print(Text(f"{title}{note}", "bold"))
    prompt, cut = _shortened(Text(f"{reveal(role)}: {prose(question)}"), width, _PROMPT_LINES, console)
    console.print(prompt)
    texts = sides(answer.before, answer.after, "answer")
    if not texts:
        console.print(Text("(not answered)", "dim italic"))
        return cut
    stacked = width < _SIDE_BY_SIDE
    for group in [[pair] for pair in texts] if stacked else [texts]:
        table, left_out = _answer_table(group, width, console)
        console.print(table)
        cut |= left_out
    return cut


def _answer_table(texts: list[tuple[str, str]], width: int, console: Console) -> tuple[Table, bool]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, width=max(width, 8), header_style="bold")
    # A border and a blank on either side of each column.
    inner = max((width - 1) // len(texts) - 3, 1)
    cells = []
    cut = False
    for name, text in texts:
        table.add_column(name, ratio=1, overflow="fold")
        whole = Text(prose(text)) or Text("(empty)", "dim italic")
        cell, left_out = _shortened(whole, inner, _ANSWER_LINES, console)
        cells.append(cell)
        cut |= left_out
    table.add_row(*cells)
    return table, cut


def _shortened(text: Text, width: int, most: int, console: Console) -> tuple[Text, bool]:
    """The text in at most `most` lines of `width` cells, and whether it was cut; an ellipsis stands for the rest."""
    from rich.text import Text

    room = width * (most + 1)
    lines = text[:room].wrap(console, width, overflow="fold")
    if len(lines) <= most and len(text) <= room:
        return Text("\n").join(lines), False
    return Text("\n").join([*lines[: most - 1], Text("…", "dim")]), True


def _print_rest(comparison: Comparison, more: int, shortened: bool, console: Console) -> None:
    """Tell where the answers that are not shown, or not whole, can be read."""
    from rich.text import Text

    told = [f"{count(more, 'more answer')}."] if more > 0 else []
    told += ["… marks where a text was cut."] if shortened else []
    if told and "answers" in dict(comparison.facts):
        told.append("Whole answers: see `answers` below.")
    if told:
        console.print()
        console.print(Text(" ".join(told), "dim"))
