"""Records as the model sees them, with the trained tokens marked: in the terminal and as a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft_dist.render.page import escape, header, page
from sft_dist.render.text import HIDDEN, named, reveal, tolerate_encoding
from sft_dist.render.wording import count, share

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Where the caller names no special tokens: the shapes that chat models give theirs.
_SPECIAL = (
    r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?(?:s|pad|unk|bos|eos|mask)>|<(?:start|end)_of_turn>"
    r"|\[/?INST\]|<</?SYS>>"
)
# What stands for something else in a text without colour, and so is named where a text holds it itself.
_OUR_MARKS = re.compile("[⟦⟧⟪⇥]")
_TAB = "⇥   "


@dataclass(frozen=True)
class TokenSpan:
    """Neighbouring tokens that are all trained, or all not, as decoded text."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewRecord:
    """One record as tokens. `where` names its file and number; `tokens` and `trained_tokens` are counts."""

    where: str
    spans: tuple[TokenSpan, ...]
    tokens: int
    trained_tokens: int
    truncated: bool
    format: str


@dataclass(frozen=True)
class PreviewSummary:
    """What the records come from.

    `template`: its origin in words. `records`: how many are shown. `special_tokens`: the tokenizer's, shown
    dimmed; empty leaves them to be known by their shape. `max_length`: where rows are cut, in tokens.
    """

    model: str
    template: str
    dataset: str
    records: int
    special_tokens: tuple[str, ...] = ()
    max_length: int | None = None


def to_terminal(records: Sequence[PreviewRecord], summary: PreviewSummary, console: Console) -> None:
    """Print the records: trained text on green or, where there is no colour, between ⟦ and ⟧.

    Without colour nothing is wrapped and each text can be read back: ⟦ ⟧ enclose what is trained, `↵` and a
    newline are a newline, `⇥` and three blanks are a tab, and `⟪U+001B⟫` is that character.
    """
    tolerate_encoding(console)
    plain = console.no_color or console.color_system is None
    pattern = _pattern(summary.special_tokens)
    for name, value in _about(records, summary):
        console.out(f"{name:<9} {reveal(value)}", highlight=False)
    if plain:
        console.out("legend    ⟦trained⟧  not trained  ↵ newline  ⇥ tab", highlight=False)
    else:
        console.print(_legend(console), soft_wrap=True)
    for at, record in enumerate(records, start=1):
        console.out("")
        title = f"[{at}/{len(records)}] {reveal(record.where)}"
        facts = "  ".join(_facts(record, summary))
        if plain:
            console.out(f"{title}  {facts}", highlight=False)
            text = _bracketed(record, pattern)
            console.out(text, highlight=False, end="" if text.endswith("\n") else "\n")
        else:
            console.print(_title(title, facts, record), overflow="fold")
            console.print(_coloured(record, pattern, console), overflow="fold")


def to_html(records: Sequence[PreviewRecord], summary: PreviewSummary) -> str:
    """The records as a page. Copying a text from it copies no marks for newlines, tabs and spaces."""
    pattern = _pattern(summary.special_tokens)
    legend = (
        '<p class="soft"><code><span class="trained">trained</span></code>: the model learns to write this. '
        "<code>not trained</code>: it only reads this. "
        "Marks: <code>↵</code> newline, <code>⇥</code> tab, <code>·</code> space at an edge of trained text, "
        '<code class="hidden">⟪U+…⟫</code> a character that would not show.</p>'
    )
    cards = [_card(record, summary, pattern) for record in records]
    empty = [] if cards else ['<p class="none">No records to show.</p>']
    body = [header("What the model sees", _about(records, summary)), "<h2>Records</h2>", legend, *cards, *empty]
    return page(f"Preview of {summary.dataset}", body)


def _about(records: Sequence[PreviewRecord], summary: PreviewSummary) -> list[tuple[str, str]]:
    tokens = sum(r.tokens for r in records)
    trained = sum(r.trained_tokens for r in records)
    truncated = sum(r.truncated for r in records)
    shown = [
        count(summary.records, "record"),
        count(tokens, "token"),
        f"{trained:,} trained ({share(trained, tokens)})",
        *([f"{truncated:,} truncated"] if truncated else []),
    ]
    return [
        ("model", summary.model),
        ("template", summary.template),
        ("data", summary.dataset),
        ("shown", ", ".join(shown)),
    ]


def _facts(record: PreviewRecord, summary: PreviewSummary) -> list[str]:
    facts = [
        reveal(record.format),
        count(record.tokens, "token"),
        f"{record.trained_tokens:,} trained ({share(record.trained_tokens, record.tokens)})",
    ]
    if record.truncated:
        facts.append(f"truncated at {summary.max_length:,} tokens" if summary.max_length else "truncated")
    return facts


def _pattern(special_tokens: Sequence[str]) -> re.Pattern[str]:
    """What in a text is not shown as it stands; the groups are the kinds of :func:`_pieces`."""
    # Longest first, so that no token is cut by one it starts with.
    known = sorted((t for t in special_tokens if t.strip() == t != ""), key=len, reverse=True)
    special = "|".join(map(re.escape, known)) or _SPECIAL
    return re.compile(
        rf"(?P<hidden>{HIDDEN})|(?P<special>{special})|(?P<newline>\n)|(?P<tab>\t)|(?P<edge>\A +| +(?=\n)| +\Z)"
    )


def _pieces(span: TokenSpan, pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """The span cut into (kind, text): text, hidden, special, newline, tab, edge (blanks at an edge, trained only)."""
    position = 0
    for match in pattern.finditer(span.text):
        if match.start() > position:
            yield "text", span.text[position : match.start()]
        kind = match.lastgroup or "text"
        yield kind if span.trained or kind != "edge" else "text", match[0]
        position = match.end()
    if position < len(span.text):
        yield "text", span.text[position:]


def _bracketed(record: PreviewRecord, pattern: re.Pattern[str]) -> str:
    marks = {"newline": "↵\n", "tab": _TAB}
    out = []
    for span in record.spans:
        pieces = (
            named(text) if kind == "hidden" else marks.get(kind) or _OUR_MARKS.sub(lambda m: named(m[0]), text)
            for kind, text in _pieces(span, pattern)
        )
        inner = "".join(pieces)
        out.append(f"⟦{inner}⟧" if span.trained else inner)
    return "".join(out) or "(no tokens)"


def _styles(console: Console) -> dict[str, dict[bool, str]]:
    """Style of each kind of piece, untrained and trained."""
    # Sixteen colours are the theme's own, where only black on green is sure to be legible.
    few = console.color_system in ("standard", "windows")
    green, faint = ("black on green", "black on green") if few else ("#ffffff on #14692f", "#9fd8b0 on #14692f")
    mark = {False: "dim", True: faint}
    styles = dict.fromkeys(("special", "newline", "tab", "edge"), mark)
    return {**styles, "text": {False: "", True: green}, "hidden": {False: "yellow", True: f"bold {green}"}}


def _coloured(record: PreviewRecord, pattern: re.Pattern[str], console: Console) -> Text:
    from rich.text import Text

    styles = _styles(console)
    out = Text()
    for span in record.spans:
        for kind, text in _pieces(span, pattern):
            shown = {
                "newline": "↵",
                "tab": _TAB,
                "edge": "·" * len(text),
                "hidden": named(text) if kind == "hidden" else "",
            }.get(kind, text)
            out.append(shown, styles[kind][span.trained])
            if kind == "newline":
                out.append("\n")
    if out.plain.endswith("\n"):
        out.right_crop(1)
    return out if record.spans else Text("(no tokens)", "dim")


def _legend(console: Console) -> Text:
    from rich.text import Text

    styles = _styles(console)
    return Text.assemble(
        "legend    ", ("trained", styles["text"][True]), "  not trained  ",
        ("<|special|>", "dim"), "  ", ("↵", "dim"), " newline  ", ("⇥", "dim"), " tab  ",
        ("·", styles["edge"][True]), " edge space",
    )  # fmt: skip


def _title(title: str, facts: str, record: PreviewRecord) -> Text:
    from rich.text import Text

    return Text.assemble((title, "bold"), "  ", (facts, "" if record.trained_tokens else "red"))


def _card(record: PreviewRecord, summary: PreviewSummary, pattern: re.Pattern[str]) -> str:
    percent = min(100 * record.trained_tokens / max(record.tokens, 1), 100)
    bar = f'<span class="bar" aria-hidden="true"><span style="width:{percent:.1f}%"></span></span>'
    style = "soft" if record.trained_tokens else "soft bad"
    facts = "".join(f'<span class="{style}">{html.escape(fact)}</span>' for fact in _facts(record, summary))
    text = "".join(_marked(span, pattern) for span in record.spans) or '<span class="none">no tokens</span>'
    return (
        f'<section class="card"><div class="head"><h3>{escape(record.where)}</h3>{facts}{bar}</div>'
        f'<div class="tokens">{text}</div></section>'
    )


def _marked(span: TokenSpan, pattern: re.Pattern[str]) -> str:
    out = []
    for kind, text in _pieces(span, pattern):
        if kind == "text":
            out.append(html.escape(text))
        elif kind == "edge":
            # The dots lie over real blanks, so that a copied text is the trained one.
            out.append("".join('<span class="dot"> </span>' for _ in text))
        elif kind == "hidden":
            out.append(f'<span class="hidden">{named(text)}</span>')
        elif kind == "special":
            out.append(f'<span class="special">{html.escape(text)}</span>')
        else:
            out.append(f'<span class="ws">{"↵" if kind == "newline" else "⇥"}</span>{text}')
    inner = "".join(out)
    return f'<mark class="trained">{inner}</mark>' if span.trained else inner
