"""The built-in data set `python-docs`: conversations about Python's standard library, made without a network.

Records come from the docstrings and language topics of the Python that runs this, so they are the same wherever
the same Python version is, and they say what its documentation says. The documentation of Python is copyright of
the Python Software Foundation and under the PSF licence; what is made from it stays under that licence.
This module is free of torch.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sft_dist.data import python_docs_inspected, python_docs_sources, python_docs_topics
from sft_dist.data import python_docs_text as text
from sft_dist.data import python_docs_turns as turns
from sft_dist.data.python_docs_entries import Entry, Parameter, members_of
from sft_dist.errors import DataError

__all__ = ["SPLITS", "Entry", "Parameter", "build", "entries", "fingerprint", "records"]

SPLITS = ("train", "test")
_VERSION = 1
_HELD_OUT = 0.05  # share of the records
_CODE = ("", "_entries", "_inspected", "_sources", "_text", "_topics", "_turns")

_Turns = list[tuple[str, str]]
_Record = tuple[str, str, _Turns]  # id, family, (question, answer) pairs


def build(split: str) -> Iterator[dict[str, object]]:
    """The records of a split, in one fixed mixed order.

    Each is `{"id": "json.dumps/1", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}`.
    The first call takes seconds. Raises :class:`DataError` for an unknown split, and where this Python comes
    without the sources of its standard library.
    """
    for name, _, pairs in records(split):
        yield {
            "id": name,
            "conversations": [
                {"from": role, "value": value}
                for question, answer in pairs
                for role, value in (("human", question), ("gpt", answer))
            ],
        }


def records(split: str) -> list[_Record]:
    """The same as (id, family, [(question, answer), ...]); a family is in one split only. Raises as :func:`build`."""
    if split not in SPLITS:
        raise DataError(f"python-docs has no split {split!r}; use one of {' and '.join(SPLITS)}")
    return _splits()[split]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every documented thing worth a question, sorted by qualified name, no two with the same text.

    Takes seconds the first time. Depends on the Python version and on what of the standard library is there.
    """
    found: dict[str, Entry] = {}
    said: set[str] = set()
    for entry in (*python_docs_topics.entries(), *python_docs_sources.entries(), *python_docs_inspected.entries()):
        key = re.sub(r"\W+", " ", entry.body).lower()
        if entry.qualname not in found and key not in said:
            said.add(key)
            found[entry.qualname] = entry
    return tuple(found[name] for name in sorted(found))


def fingerprint() -> str:
    """What the records depend on, as a digest: the Python version, its platform and the code of the builder."""
    digest = hashlib.sha256(f"{_VERSION} {sys.version_info} {platform.system()}".encode())
    for name in _CODE:
        file = Path(__file__).with_name(f"python_docs{name}.py")
        digest.update(file.read_bytes() if file.is_file() else name.encode())
    return digest.hexdigest()


@functools.cache
def _splits() -> dict[str, list[_Record]]:
    records = _distinct(sorted(_records(), key=lambda record: record[0]))
    if len(records) < 1000:
        raise DataError(
            "python-docs needs the sources of Python's standard library, and this Python has none; "
            "use another Python, or set data.dataset_name to data of your own"
        )
    held = _held_out(records)
    train = [record for record in records if record[1] not in held]
    said = "\0".join(re.sub(r"\s+", " ", answer) for _, _, pairs in train for _, answer in pairs)
    test = [record for record in records if record[1] in held and not _occurs(record, said)]
    return {"train": sorted(train, key=_order), "test": sorted(test, key=_order)}


def _order(record: _Record) -> bytes:
    return hashlib.sha256(f"order\0{record[0]}".encode()).digest()


def _held_out(records: list[_Record]) -> set[str]:
    """Families, whole, in the order of their hash, until the share is full; large ones are always trained on."""
    size: dict[str, int] = {}
    for _, family, _ in records:
        size[family] = size.get(family, 0) + 1
    held: set[str] = set()
    room = round(_HELD_OUT * len(records))
    for family in sorted(size, key=lambda family: hashlib.sha256(f"held out\0{family}".encode()).digest()):
        if size[family] <= min(room, len(records) // 100):
            held.add(family)
            room -= size[family]
    return held


def _occurs(record: _Record, said: str) -> bool:
    """Whether an answer, with or without its code and first words, is part of what is trained on."""
    for _, answer in record[2]:
        for part in (answer, *text.split_blocks(answer)):
            plain = re.sub(r"\s+", " ", re.sub(r"^`[^`]+` \w+ ", "", part)).strip()
            if (len(plain) >= 40 or part is answer) and plain in said:
                return True
    return False


def _distinct(records: list[_Record]) -> list[_Record]:
    """Records none of whose answers was given before."""
    kept: list[_Record] = []
    seen: set[str] = set()
    for record in records:
        answers = {re.sub(r"\s+", " ", answer).lower() for _, answer in record[2]}
        if not answers & seen:
            seen |= answers
            kept.append(record)
    return kept


def _records() -> Iterator[_Record]:
    every = entries()
    members = members_of(every)
    told: set[str] = set()  # entries whose text is part of another's conversation
    for kind in ("module", "class"):
        for entry in every:
            if entry.kind == kind and entry.qualname not in told:
                yield from _about_container(entry, members.get(entry.qualname, []), told)
    for entry in every:
        if entry.qualname in told or entry.kind in ("module", "class"):
            continue
        if entry.kind == "topic":
            yield _record(entry, 1, _topic(entry))
        else:
            yield from _about_call(entry)


def _record(entry: Entry, number: int, pairs: _Turns) -> _Record:
    name = entry.qualname if entry.module else "topic." + re.sub(r"\W+", "-", entry.qualname).strip("-")
    return f"{name}/{number}", entry.family, pairs


def _about_container(entry: Entry, members: list[Entry], told: set[str]) -> Iterator[_Record]:
    """A module or class: what it is, and as a second record or as further turns what it contains."""
    listed = turns.member_list(entry, members) if len(members) > 1 else ""
    if listed and turns.draw(entry, "dialogue", 3):
        pairs = [(turns.ask(entry), turns.describe(entry, 900)), (turns.ask_members(entry, then=True), listed)]
        # What the list does not already say in full.
        free = [one for one in members if one.qualname not in told and len(one.body) > len(one.summary) + 40]
        one = free[turns.draw(entry, "member", len(free))] if free else None
        if one:
            told.add(one.qualname)
            pairs.append((turns.ask_member(one), turns.describe(one, 900)))
        if one and one.parameters and turns.draw(entry, "fourth", 2):
            pairs.append((turns.ask_arguments(one, then=True), turns.arguments(one)))
        yield _record(entry, 1, pairs)
        return
    yield _record(entry, 1, _whole(entry))
    if listed:
        yield _record(entry, 2, [(turns.ask_members(entry), listed)])


def _about_call(entry: Entry) -> Iterator[_Record]:
    """A function, method or attribute: its main conversation, and for some its arguments on their own."""
    dialogue = _dialogue(entry)
    if dialogue and turns.draw(entry, "dialogue", 20) < 11:
        yield _record(entry, 1, dialogue)
        return
    if entry.signature and (len(entry.body) < 90 or turns.draw(entry, "usage", 3) == 0):
        if turns.task(entry) and turns.draw(entry, "find", 2):
            yield _record(entry, 1, [(turns.ask_finding(entry), turns.finding(entry))])
        else:
            yield _record(entry, 1, [(turns.ask_usage(entry), turns.usage(entry))])
        return
    yield _record(entry, 1, _whole(entry))
    if len(entry.parameters) > 1 and turns.draw(entry, "arguments too", 2):
        yield _record(entry, 2, [(turns.ask_arguments(entry), turns.arguments(entry))])


def _whole(entry: Entry) -> _Turns:
    return [(turns.ask(entry), turns.describe(entry))]


def _dialogue(entry: Entry) -> _Turns:
    """Several turns about one entry, from the kinds that its text allows; empty where it allows none."""
    kinds: list[_Turns] = []
    more = turns.details(entry, 900)
    if more and len(entry.summary) >= 40 and entry.summary[-1] != ":" and len(more[0]) >= 80:
        pairs = [(turns.ask(entry), turns.opening(entry))]
        kinds.append(pairs + [(turns.ask_more(entry, at), answer) for at, answer in enumerate(more[:2])])
    if entry.examples and len(turns.without_examples(entry)) >= 40:
        shown = (turns.ask_example(entry), turns.examples(entry))
        kinds.append([(turns.ask(entry), turns.without_examples(entry)), shown])
    if entry.parameters and (len(entry.parameters) > 1 or entry.coroutine) and len(entry.body) >= 50:
        called = (turns.ask_arguments(entry, then=True), turns.arguments(entry))
        kinds.append([*_whole(entry), called])
    return kinds[turns.draw(entry, "kind", len(kinds))] if kinds else []


def _topic(entry: Entry) -> _Turns:
    """A section of the language reference, in up to three turns."""
    parts = text.split_blocks(entry.body)
    pairs: _Turns = []
    while parts and len(pairs) < 3:
        taken = text.cut(parts, 1000)
        question = turns.ask_more(entry, len(pairs)) if pairs else turns.ask(entry)
        pairs.append((question, "\n\n".join(taken)))
        parts = parts[len(taken) :]
    return pairs
