"""Self-contained pages: no script, no external resource, light and dark, fit to print."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from sft_dist.render.style import STYLE
from sft_dist.render.text import prose, reveal

# An opening fence, its info string, and the block up to a closing fence or, in an answer that was cut, the end.
_FENCE = re.compile(
    r"^[ ]{0,3}(?P<mark>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)(?:^[ ]{0,3}(?P=mark)[`~]*[ \t]*(?:\n|\Z)|\Z)",
    re.MULTILINE | re.DOTALL,
)
# Nothing on these pages may load or run, whatever slips into a text.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def escape(text: str) -> str:
    """Text for HTML: markup escaped, hidden characters named."""
    return html.escape(reveal(text))


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document. `title` is plain text, `body` the markup of its parts."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def header(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """The head of a page: its title and what it is about."""
    return f"<header>\n<h1>{escape(title)}</h1>\n{pairs(rows)}\n</header>"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a definition list; nothing where there are none."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in rows if v)
    return f"<dl>{items}</dl>" if items else ""


def formatted(text: str) -> str:
    """A message as it was written, with the code between ``` fences set apart in monospace."""
    text = prose(text)
    parts = []
    position = 0
    for match in _FENCE.finditer(text):
        parts.append(_paragraph(text[position : match.start()]))
        info = match["info"].strip()
        label = f'<span class="info">{html.escape(info)}</span>' if info else ""
        parts.append(f'{label}<pre class="code"><code>{html.escape(match["code"].rstrip())}</code></pre>')
        position = match.end()
    parts.append(_paragraph(text[position:]))
    return "".join(parts)


def _paragraph(text: str) -> str:
    text = text.strip("\n")
    return f'<p class="prose">{html.escape(text)}</p>' if text.strip() else ""
