"""The built-in data set `python-docs-pairs`: the right documentation beside one that is wrong or cut off.

Made of the records of `python-docs`, split as they are: a question, the answer that the documentation gives to it,
and as the rejected side one of three kinds:

- `near`: the answer to another question of the same module
- `far`: the answer to a question of another module
- `truncated`: the right answer, which breaks off in mid-sentence

What is rejected is an answer of the same form (a signature, a list of members, a text), and each side is the longer one
in half of the pairs, so that neither form nor length tells which side is which. An answer is taken from the questions
of its own split only. The licence is that of `python-docs`. This module is free of torch.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sft_dist.data import python_docs

__all__ = ["KINDS", "SPLITS", "build", "fingerprint"]

SPLITS = python_docs.SPLITS
KINDS = ("near", "far", "truncated")
# A truncated side is always the shorter one, so that a wrong one has to be the longer one in three of four pairs.
_LONGER = 0.75
# Of answers of like length, this many are drawn from.
_CHOICES = 6
# What is cut off leaves at least so many characters, and at most so large a share of the answer.
_SHORTEST_CUT = 24
_LONGEST_CUT = 0.85
_FORMS = (
    ("finding", re.compile(r"Use `")),
    ("call", re.compile(r"```python\n(?!>>>)")),
    ("members", re.compile(r"These [a-z ]+ of `|`[\w.]+` documents \d+ ")),
    ("arguments", re.compile(r"`[\w.]+` takes \w+ arguments?:")),
)


@dataclass(frozen=True)
class _Answer:
    """An answer that may stand on a rejected side."""

    text: str
    name: str
    """Of what it documents."""
    family: str


def build(split: str) -> Iterator[dict[str, object]]:
    """The pairs of a split, in the order of the records of `python-docs`.

    Each is `{"id": "json.dumps/1", "kind": "near", "prompt": ..., "chosen": ..., "rejected": ...}`. The first call
    takes seconds. Raises :class:`DataError` as `python_docs.build` does.
    """
    yield from _pairs(split)


def fingerprint() -> str:
    """What the pairs depend on, as a digest: what `python-docs` depends on, and the code of this module."""
    return hashlib.sha256(python_docs.fingerprint().encode() + Path(__file__).read_bytes()).hexdigest()


@functools.cache
def _pairs(split: str) -> tuple[dict[str, object], ...]:
    records = python_docs.records(split)
    by_form: dict[str, list[_Answer]] = {}
    for name, family, ((_, text), *_) in records:
        by_form.setdefault(_form(text), []).append(_Answer(text, _documented(name), family))
    for answers in by_form.values():
        answers.sort(key=lambda answer: (len(answer.text), answer.text))
    pairs: list[dict[str, object]] = []
    for name, family, ((question, text), *_) in records:
        found = _rejected(name, family, text, by_form[_form(text)])
        if found is not None:
            kind, rejected = found
            pairs.append({"id": name, "kind": kind, "prompt": question, "chosen": text, "rejected": rejected})
    return tuple(pairs)


def _rejected(name: str, family: str, text: str, answers: Sequence[_Answer]) -> tuple[str, str] | None:
    """Kind and text of the rejected side: of the kind that is drawn, or of the next one that can be had."""
    first = _draw(name, "kind", len(KINDS))
    for kind in (*KINDS[first:], *KINDS[:first]):
        found = _truncated(name, text) if kind == "truncated" else _wrong(name, family, text, answers, kind == "near")
        if found is not None:
            return kind, found
    return None


def _wrong(name: str, family: str, text: str, answers: Sequence[_Answer], near: bool) -> str | None:
    """An answer to another question, of like length: longer or shorter as it is drawn, where there is one.

    `answers`: of the same form, by length. `near`: of the same family, else of any other.
    """

    def fit(some: Iterable[_Answer]) -> list[str]:
        found = (a.text for a in some if (a.family == family) == near and a.name != _documented(name))
        return list(islice(found, _CHOICES))

    below = bisect.bisect_left(answers, len(text), key=lambda answer: len(answer.text))
    above = bisect.bisect_right(answers, len(text), key=lambda answer: len(answer.text))
    longer, shorter = fit(islice(answers, above, None)), fit(reversed(answers[:below]))
    wanted = longer if _draw(name, "longer", 100) < 100 * _LONGER else shorter
    choices = wanted or longer or shorter
    return choices[_draw(name, "choice", len(choices))] if choices else None


def _truncated(name: str, text: str) -> str | None:
    """The answer up to a word in mid-sentence; None where it is too short for that."""
    ends = [
        match.start()
        for match in re.finditer(r"\s+", text)
        if _SHORTEST_CUT <= match.start() <= _LONGEST_CUT * len(text) and re.match(r"[\w,]", text[match.start() - 1])
    ]
    # In a fenced block any line ends on a word, and a signature without the text below it is no sentence.
    ends = [end for end in ends if not text[:end].count("```") % 2]
    return text[: ends[_draw(name, "cut", len(ends))]] if ends else None


def _form(text: str) -> str:
    return next((form for form, start in _FORMS if start.match(text)), "text")


def _documented(name: str) -> str:
    """What a record is about: its id without the number."""
    return name.rsplit("/", 1)[0]


def _draw(name: str, purpose: str, count: int) -> int:
    """A number below `count` that depends on the record and on what it is drawn for, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"pairs\0{purpose}\0{name}".encode()).digest()[:6]) % count
