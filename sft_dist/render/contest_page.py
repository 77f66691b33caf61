"""The page of a contest: big figures, the table, and every response whole, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sft_dist.render.page import escape, formatted, header, page, pairs
from sft_dist.render.wording import count

if TYPE_CHECKING:
    from sft_dist.render.contest import Asked, Contest, Line

_STYLE = {True: " good", False: " bad", None: ""}


def contest_page(contest: Contest, lines: list[Line], about: str) -> str:
    """The whole HTML document; all texts are escaped. `lines`: of the table. `about`: what its columns are."""
    names = ", ".join(contender.name for contender in contest.contenders)
    title = f"{names} side by side"
    top = [("rewards by", contest.reward_model), ("prompts", f"{len(contest.asked)} held out of {contest.dataset}")]
    body = [header(title, top), "<h2>Mean held-out reward</h2>", _figures(contest, lines), _table(lines)]
    body.append(f'<p class="soft">{escape(about)}</p>')
    body.append("<h2>Responses to held-out prompts</h2>")
    body.append('<p class="soft">The highest reward among the models is green.</p>')
    body += [_card(contest, at, one) for at, one in enumerate(contest.asked)]
    body += ["<h2>Where things are</h2>", pairs([*((c.name, c.path) for c in contest.contenders), *contest.facts])]
    return page(title, body)


def _figures(contest: Contest, lines: list[Line]) -> str:
    figures = []
    for contender, line in zip(contest.contenders, lines, strict=False):
        value = f"{np.mean(contender.rewards):.2f}"
        name, style = escape(contender.name), _STYLE[line.better]
        figures.append(
            f'<div class="figure{style}"><span class="name">{name}</span><span class="value">{value}</span></div>'
        )
    return f'<div class="figures">{"".join(figures)}</div>'


def _table(lines: list[Line]) -> str:
    from sft_dist.render.contest import HEADINGS

    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = []
    for line in lines:
        cells = [line.reward, "", line.wins, line.kl, line.tokens, line.ended, line.perplexity]
        cells = [f"<td>{escape(cell)}</td>" for cell in cells]
        cells[1] = f'<td class="change{_STYLE[line.better]}">{escape(line.change)}</td>'
        rows.append(f'<tr><th scope="row">{escape(line.name)}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _card(contest: Contest, at: int, one: Asked) -> str:
    turns = "".join(
        f'<div class="turn"><span class="role">{escape(role)}</span>{formatted(content)}</div>'
        for role, content in one.prompt
    )
    best = max(contender.samples[at].reward for contender in contest.contenders)
    columns = []
    for contender in contest.contenders:
        sample = contender.samples[at]
        ended = "" if sample.ended else ", cut at the limit"
        told = f"reward {sample.reward:.2f}, {count(sample.tokens, 'token')}{ended}"
        columns.append(_column(contender.name, told, sample.text, " best" if sample.reward == best else ""))
    columns.append(_column("the data's answer", f"reward {one.reward:.2f}", one.reference, ""))
    return (
        f'<section class="card"><div class="head"><h3>Prompt {at + 1} of {len(contest.asked)}</h3></div>'
        f'<div class="prompt">{turns}</div><div class="answers even">{"".join(columns)}</div></section>'
    )


def _column(name: str, told: str, text: str, style: str) -> str:
    shown = formatted(text) or '<p class="none">empty</p>'
    return (
        f'<div class="answer{style}"><span class="role">{escape(name)} '
        f'<span class="reward">{escape(told)}</span></span>{shown}</div>'
    )
