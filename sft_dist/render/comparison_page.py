"""The page of a comparison: big figures, the learning curve, and every answer whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_dist.render.curve import learning_curve_svg
from sft_dist.render.page import escape, formatted, header, page, pairs
from sft_dist.render.wording import change, count, difference, measured_on, number, sides

if TYPE_CHECKING:
    from sft_dist.render.comparison import Answer, Comparison, Figure, Measure

_ABOUT_PERPLEXITY = (
    "Perplexity is the exponential of the mean loss over the response tokens: "
    "the number of equally likely tokens the model is in doubt between at each step."
)


def comparison_page(comparison: Comparison) -> str:
    """The whole HTML document; all texts of the comparison are escaped."""
    about = [("model", comparison.model), ("data", comparison.dataset)]
    body = [header(comparison.title, about), *(_figures(comparison) if comparison.lead is None else _lead(comparison))]
    body += _further(comparison)
    curve = comparison.curve and learning_curve_svg(
        comparison.curve.train, comparison.curve.held_out, comparison.curve_unit
    )
    if curve:
        body += ["<h2>Learning curve</h2>", curve]
    body.append("<h2>Answers to held-out prompts</h2>")
    total = len(comparison.answers)
    body += [_card(answer, f"Answer {at} of {total}") for at, answer in enumerate(comparison.answers, start=1)]
    if not total:
        body.append('<p class="none">No prompts were answered.</p>')
    if comparison.facts:
        body += ["<h2>The run</h2>", pairs(comparison.facts)]
    return page(comparison.title, body)


def _figures(comparison: Comparison) -> list[str]:
    before, after = comparison.before, comparison.after
    measures = sides(before, after, "measured")
    title = "<h2>Held-out perplexity</h2>"
    if not measures:
        return [title, '<p class="none">Not measured.</p>']
    figures = [_figure(name, number(measure.perplexity)) for name, measure in measures]
    if before and after:
        figures.insert(1, '<span class="arrow" aria-label="to">→</span>')
        text, verdict = change(before.perplexity, after.perplexity)
        style = {"better": " good", "worse": " bad"}.get(verdict, "")
        if text or verdict:
            figures.append(_figure(verdict or "change", text or number(after.perplexity - before.perplexity), style))
    return [
        title,
        f'<div class="figures">{"".join(figures)}</div>',
        f'<p class="soft">{escape(_loss_line(before, after))} {escape(measured_on(before, after))}</p>',
        f'<p class="soft">{_ABOUT_PERPLEXITY}</p>',
    ]


def _lead(comparison: Comparison) -> list[str]:
    """The figure that stands first, where it is not perplexity."""
    lead, before, after = comparison.lead, comparison.before, comparison.after
    assert lead is not None
    title = f"<h2>Held out: {escape(lead.name)}</h2>"
    shown = [(name, value) for name, value in sides(lead.before, lead.after, "measured")]
    if not shown:
        return [title, '<p class="none">Not measured.</p>']
    figures = [_figure(name, number(value, lead.digits)) for name, value in shown]
    if len(shown) > 1:
        figures.insert(1, '<span class="arrow" aria-label="to">→</span>')
    return [
        title,
        f'<div class="figures">{"".join(figures)}</div>',
        f'<p class="soft">{escape(measured_on(before, after, lower_is_better=False))}</p>',
    ]


def _further(comparison: Comparison) -> list[str]:
    """What else was measured, as a table."""
    if not comparison.figures:
        return []
    heads = [name for name, _ in sides(comparison.before, comparison.after, "measured")]
    heads += ["change"] if len(heads) > 1 else []
    rows = [_further_row(figure, len(heads)) for figure in comparison.figures]
    columns = "".join(f"<th>{escape(head)}</th>" for head in ["held out", *heads])
    return [f'<table class="plain"><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>']


def _further_row(figure: Figure, columns: int) -> str:
    one = figure.after if figure.before is None else figure.before
    values = [figure.before, figure.after] if columns > 1 else [one]
    cells = ["" if value is None else number(value, figure.digits) for value in values]
    style = {"better": ' class="good"', "worse": ' class="bad"'}.get(figure.verdict, "")
    if columns > 1:
        known = figure.before is not None and figure.after is not None
        moved = f"{(figure.after or 0) - (figure.before or 0):+.{figure.digits}f}" if known else ""
        cells.append(f"{moved} {figure.verdict}".strip())
    *plain, last = [f"<td>{escape(cell)}</td>" for cell in cells]
    return f"<tr><td>{escape(figure.name)}</td>{''.join(plain)}{last.replace('<td>', f'<td{style}>')}</tr>"


def _figure(name: str, value: str, style: str = "") -> str:
    return f'<div class="figure{style}"><span class="name">{name}</span><span class="value">{value}</span></div>'


def _loss_line(before: Measure | None, after: Measure | None) -> str:
    losses = " → ".join(number(measure.loss, 3) for _, measure in sides(before, after, ""))
    moved = difference(before.loss, after.loss) if before and after else ""
    return f"Loss {losses}" + (f" ({moved})." if moved else ".")


def _card(answer: Answer, title: str) -> str:
    turns = "".join(
        f'<div class="turn"><span class="role">{escape(role)}</span>{formatted(content) or _none("empty")}</div>'
        for role, content in answer.prompt
    )
    texts = sides(answer.before, answer.after, "answer")
    columns = [_column(name, text, "") for name, text in texts]
    columns.append(_column("reference", answer.reference, " reference"))
    layout = "answers" if len(texts) > 1 else "answers single"
    return (
        f'<section class="card"><div class="head"><h3>{escape(title)}</h3>'
        f'<span class="soft">{count(len(answer.prompt), "turn")}</span></div>'
        f'<div class="prompt">{turns or _none("no prompt")}</div>'
        f'<div class="{layout}">{"".join(columns)}</div></section>'
    )


def _column(name: str, text: str, style: str) -> str:
    return f'<div class="answer{style}"><span class="role">{name}</span>{formatted(text) or _none("empty")}</div>'


def _none(text: str) -> str:
    return f'<p class="none">{text}</p>'
