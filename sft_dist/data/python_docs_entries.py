"""What the documentation of Python's standard library says about one thing, as an :class:`Entry`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.data import python_docs_text as text

Kind = Literal["module", "class", "function", "method", "property", "topic"]
Passing = Literal["positional-only", "positional", "variadic", "keyword-only"]

_EMPTY_TALK = re.compile(
    r"^(see (also|base|the|pep|module|help)\b|internal|private|overrid|todo|xxx|dummy|deprecated\b.{0,9}$"
    r"|->|\w+=|\w[\w.]*\(.*\) *-+>.{0,20}$)",
    re.I,
)
_NOT_FOR_USERS = re.compile(
    r"\W*((?i:copyright|written by|authors?|\(c\)|licen[cs]ed?|all rights reserved|xxx)\b|[Bb]y [A-Z]\w+ [A-Z]|\$Id)"
)
_TAIL = re.compile(r"(?s)\n\W*(?:TO-?DO|To-Do|History|HISTORY|XXX|Authors?|Changes)\b[^\n]{0,12}\n.*")
_SIGNATURE_LINE = re.compile(
    r"(?:async )?(?:[\w, ()\[\]]+ = )?(?:[\w.]*\.)?(\w+)\s*\([^\n]*?\)[ ]*(?:-+>[ ]*([^\n]*?))?"
    r"(?:\s+--?\s+|:\s+|\.?[ ]*(?:\n\s*|\Z))"
)
_TITLE = re.compile(r"(?:The )?([\w.]+?)(?:\.py)?\s*(?:--?|:|—)\s+")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a call: its name (with stars), how it is passed, and the source text of its default."""

    name: str
    kind: Passing
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing.

    `signature` is the call's `(a, b=1)` without `self`, or empty where there is none. `summary` is the first
    paragraph of `body`; `body` is Markdown; `examples` are the doctests in it, each a fenced block. `family` names
    what is held out together: a module, a builtin type, or a section of a language topic.
    """

    qualname: str
    kind: Kind
    module: str
    signature: str
    summary: str
    body: str
    family: str
    parameters: tuple[Parameter, ...] = ()
    examples: tuple[str, ...] = ()
    coroutine: bool = False

    @property
    def name(self) -> str:
        """The last part of the qualified name."""
        return self.qualname.rsplit(".", 1)[-1]

    @property
    def owner(self) -> str:
        """The qualified name of what holds this: a class for a method, a module for a function."""
        return self.qualname.rpartition(".")[0]


def make_entry(qualname: str, kind: Kind, module: str, doc: str, **more: Any) -> Entry | None:
    """An entry from a docstring, or None where the docstring says nothing."""
    name = qualname.rsplit(".", 1)[-1]
    doc = inspect.cleandoc(doc)
    if kind == "module":
        title = _TITLE.match(doc)
        doc = doc[title.end() :] if title and title[1].endswith(name) else doc
    else:
        doc = _without_calls(doc, name)
    parts = [part for part in text.blocks(_TAIL.sub("", doc)) if not _NOT_FOR_USERS.match(part)]
    while parts and text.is_code(parts[0]) and len(parts) > 1 and kind != "topic":
        parts = parts[1:]
    if not parts or text.is_code(parts[0]) or len(parts[0]) < 12 or len(parts[0].split()) < 3:
        return None
    if _EMPTY_TALK.match(parts[0]):
        return None
    parts[0] = _as_sentence(parts[0])
    family = more.pop("family", module.split(".")[0])
    return Entry(
        qualname=qualname,
        kind=kind,
        module=module,
        signature=more.pop("signature", ""),
        summary=parts[0],
        body="\n\n".join(parts),
        family=family,
        examples=tuple(part for part in parts if part.startswith("```python\n>>>")),
        **more,
    )


def _without_calls(doc: str, name: str) -> str:
    """A docstring without the calls it may begin with; several ways to call are kept, as code, after the text."""
    calls: list[str] = []
    while (line := _SIGNATURE_LINE.match(doc)) and line[1] == name:
        rest = doc[line.end() :]
        # What follows the arrow may be a sentence that goes on in the next line, not only a type.
        begun = line[2] and len(line[2].split()) > 3 and re.match(rf"[a-z](?!\w*\()(?!{name}\b)", rest)
        calls.append(line[0].strip())
        doc = f"{line[2]}\n{rest}" if begun else rest
    listed = "\n".join(f"    {call}" for call in calls)
    return f"{doc}\n\nWays to call it::\n\n{listed}" if len(calls) > 1 and doc.strip() else doc.strip()


def _as_sentence(paragraph: str) -> str:
    paragraph = paragraph[0].upper() + paragraph[1:] if re.match(r"[a-z]+\s", paragraph) else paragraph
    if "\n" in paragraph or paragraph.startswith("- "):
        return paragraph
    return paragraph + "." if re.search(r"[\w)`'\"\]]$", paragraph) else paragraph


def members_of(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The documented contents of each module and class, by its qualified name, sorted by name."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind not in ("module", "topic"):
            found.setdefault(entry.owner or entry.module, []).append(entry)
    return found
