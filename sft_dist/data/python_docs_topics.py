"""Entries from Python's language topics (`pydoc_data.topics`): sections, and the methods that they define."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from sft_dist.data import python_docs_text as text
from sft_dist.data.python_docs_entries import Entry

_SKIPPED = frozenset({"debugger", "operator-summary"})  # a manual of one program, and a table
_HEADING = re.compile(r"(?m)^(\S.*)\n([*=~^\"-])\2{2,}$")
_DEFINITION = re.compile(
    r"(?m)^((?:(?:class|exception|classmethod|static|async) )*)([A-Za-z_][\w.]*)\(([^\n]*)\)\n\n((?: {3}.*\n|\n)+)"
)
_FOOTNOTES = re.compile(r"(?s)\n-\[ Footnotes \]-.*")
_POINTER = re.compile(r"\s*\((?:see|See) (?:also )?(?:section )?[A-Z][^()]*\)| \[\d\](?=[\s.,]|$)")


def entries() -> list[Entry]:
    """The sections of all topics, no section twice; none where the distribution has no topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    found: list[Entry] = []
    seen: set[str] = set()
    for key in sorted(topics.keys() - _SKIPPED, key=lambda key: (len(topics[key]), key)):
        for title, section in _sections(_FOOTNOTES.sub("", topics[key])):
            mark = re.sub(r"\s+", " ", section)
            if mark not in seen:
                seen.add(mark)
                found += _section_entries(title, section)
    return found


def _sections(topic: str) -> Iterator[tuple[str, str]]:
    heads = list(_HEADING.finditer(topic))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        yield head[1].strip(), topic[head.end() : following.start() if following else len(topic)].strip("\n") + "\n"


def _section_entries(title: str, section: str) -> Iterator[Entry]:
    title = _quotes(title)
    family = f"topic {title}"
    for match in _DEFINITION.finditer(section):
        marks, name, arguments, body = match.groups()
        before = section[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        several = False
        if section[match.start() - 2 : match.start()].strip() and before.endswith(")") and not before.startswith(" "):
            if f"{name}(" not in before:
                continue  # one of several names that share a text
            several = True
        arguments = re.sub(r"^self(?:, |$)", "", arguments)
        doc = "\n\n".join(_blocks(textwrap.dedent(body)))
        kind = "class" if "class " in marks else "method" if "." in name else "function"
        if doc and (entry := _entry(name, kind, "builtins", doc, "" if several else f"({arguments})", family)):
            yield entry
    rest = _DEFINITION.sub("", section)
    if "+---" in rest or re.search(r"(?m)^\w[\w.]*\(.*\)$", rest):
        return  # a table, or a definition whose text went elsewhere
    parts = _blocks(rest)
    if parts and not text.is_code(parts[0]) and len(parts[0]) >= 60 and not parts[0].endswith(":"):
        yield _entry(title, "topic", "", "\n\n".join(parts), "", family)
    elif len(parts) > 1 and text.is_code(parts[0]) and not text.is_code(parts[1]):
        # A statement's grammar comes first there; words read better at the start.
        yield _entry(title, "topic", "", "\n\n".join([parts[1], parts[0], *parts[2:]]), "", family)


def _entry(name: str, kind: str, module: str, doc: str, signature: str, family: str) -> Entry:
    parts = text.split_blocks(doc)
    examples = tuple(part for part in parts if part.startswith("```python\n>>>"))
    return Entry(name, kind, module, signature, parts[0], doc, family, (), examples)  # type: ignore[arg-type]


def _blocks(section: str) -> list[str]:
    """Blocks of a topic, whose literal text is quoted and whose code is indented without a mark."""
    found: list[str] = []
    for grammar, run in _runs(section):
        if grammar:
            found.append(f"```\n{textwrap.dedent(run).strip()}\n```")
        else:
            found += [part if text.is_code(part) else _quotes(_POINTER.sub("", part)) for part in text.blocks(run)]
    return found


def _runs(section: str) -> Iterator[tuple[bool, str]]:
    """Text and grammar productions in turn."""
    kept: list[str] = []
    for paragraph in re.split(r"\n{2,}(?=\S)|\n{2,}(?=   \S.*::=)", section):
        if re.match(r" +\w+ +::=", paragraph):
            yield False, "\n\n".join(kept)
            kept = []
            yield True, paragraph.strip("\n")
        else:
            kept.append(paragraph)
    yield False, "\n\n".join(kept)


def _quotes(paragraph: str) -> str:
    paragraph = re.sub(r'""([^"`]+)""', r'`"\1"`', paragraph)
    return re.sub(r'(?<![`\w])"([^"`\s][^"`\n]{0,70}?)"(?!`)', r"`\1`", paragraph)
