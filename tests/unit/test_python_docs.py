"""The built-in data set: the same everywhere, true to the documentation, and clean enough to train on."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_dist.data import python_docs
from sft_dist.data.python_docs_entries import make_entry
from sft_dist.data.python_docs_text import blocks, cut, split_blocks
from sft_dist.errors import DataError

ROOT = Path(__file__).parents[2]
PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from sft_dist.data import python_docs
for split in python_docs.SPLITS:
    for record in python_docs.build(split):
        print(json.dumps(record))
print(python_docs.fingerprint())
assert "torch" not in sys.modules and "pydantic" not in sys.modules
"""

Record = dict[str, Any]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that build while this one does, each in surroundings of its own."""
    runs: list[tuple[list[str], dict[str, str], Path]] = [
        # No third-party package can be imported under -S, so nothing here can depend on one.
        (["-I", "-S"], {"LC_ALL": "C"}, tmp_path_factory.mktemp("cwd")),
        ([], {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "12345", "HOME": "/nowhere"}, Path("/")),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, *flags, "-c", PROGRAM],
            cwd=cwd,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for flags, env, cwd in runs
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def splits(elsewhere: list[subprocess.Popen[bytes]]) -> dict[str, list[Record]]:
    return {split: list(python_docs.build(split)) for split in python_docs.SPLITS}


@pytest.fixture(scope="module")
def records(splits: dict[str, list[Record]]) -> list[Record]:
    return splits["train"] + splits["test"]


def answers(records: list[Record]) -> list[str]:
    return [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def prose(text: str) -> Iterator[str]:
    return (part for part in split_blocks(text) if not part.startswith("```"))


def test_every_process_makes_the_same_bytes(
    splits: dict[str, list[Record]], elsewhere: list[subprocess.Popen[bytes]]
) -> None:
    here = [json.dumps(record) for split in python_docs.SPLITS for record in splits[split]]
    for process in elsewhere:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert out.decode().splitlines() == [*here, python_docs.fingerprint()]


def test_thousands_of_conversations_with_a_twentieth_held_out(splits: dict[str, list[Record]]) -> None:
    total = len(splits["train"]) + len(splits["test"])
    assert 3000 <= total <= 6000
    assert 0.03 <= len(splits["test"]) / total <= 0.06


def test_a_share_of_the_conversations_has_several_turns(splits: dict[str, list[Record]]) -> None:
    for records in splits.values():
        assert sum(len(record["conversations"]) >= 4 for record in records) / len(records) >= 0.15


def test_answers_are_short_enough_to_train_on_and_long_enough_to_say_something(records: list[Record]) -> None:
    lengths = [len(answer) for answer in answers(records)]
    assert 100 <= statistics.median(lengths) <= 600
    assert min(lengths) >= 12
    assert max(lengths) <= 2000


def test_roles_alternate_and_no_turn_is_empty(records: list[Record]) -> None:
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(turn["value"].strip() == turn["value"] != "" for turn in turns), record["id"]


def test_ids_and_answers_are_each_there_once(records: list[Record]) -> None:
    assert len({record["id"] for record in records}) == len(records)
    said = [flat(answer).lower() for answer in answers(records)]
    assert len(set(said)) == len(said)


def test_no_held_out_answer_is_trained_on(splits: dict[str, list[Record]]) -> None:
    trained = "\0".join(flat(answer) for answer in answers(splits["train"]))
    assert [answer for answer in answers(splits["test"]) if flat(answer) in trained] == []


def test_the_first_records_are_a_mixed_sample(splits: dict[str, list[Record]]) -> None:
    modules = {record["id"].split("/")[0].split(".")[0] for record in splits["train"][:100]}
    assert len(modules) >= 30


def test_questions_vary(records: list[Record]) -> None:
    openings = {" ".join(record["conversations"][0]["value"].split()[:3]) for record in records}
    assert len(openings) >= 100


def test_no_character_that_a_tokenizer_or_utf8_refuses(records: list[Record]) -> None:
    for record in records:
        for turn in record["conversations"]:
            turn["value"].encode("utf-8")
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", turn["value"]), record["id"]


def test_no_noise_of_restructured_text_is_left(records: list[Record]) -> None:
    noise = re.compile(r":[a-z]+:`|``|^\.\. |::$|^:(?:param|return|type|raises)", re.M)
    assert [part for answer in answers(records) for part in prose(answer) if noise.search(part)] == []
    assert all(answer.count("```") % 2 == 0 for answer in answers(records))


def test_json_dumps_is_described_in_its_own_words(records: list[Record]) -> None:
    entry = next(entry for entry in python_docs.entries() if entry.qualname == "json.dumps")
    assert (entry.kind, entry.module, entry.family) == ("function", "json", "json")
    assert entry.signature.startswith("(obj, *, skipkeys=False, ")
    assert entry.parameters[0] == python_docs.Parameter("obj", "positional")
    assert entry.parameters[1] == python_docs.Parameter("skipkeys", "keyword-only", "False")
    assert entry.summary == "Serialize `obj` to a JSON formatted `str`."
    said = " ".join(a for r in records for a in answers([r]) if "json.dumps" in json.dumps(r))
    assert "to a JSON formatted `str`." in said


def test_first_sentences_are_those_of_the_docstrings(records: list[Record]) -> None:
    for name, words in {
        "shutil.which": "the path which conforms to the given mode on the PATH",
        "textwrap.dedent": "any common leading whitespace from every line",
        "statistics.median": "the median (middle value) of numeric data.",
    }.items():
        about = [record for record in records if record["id"].startswith(f"{name}/")]
        assert any(words in flat(answer) for answer in answers(about)), name


def test_signatures_are_calls_that_parse(records: list[Record]) -> None:
    signed = [entry for entry in python_docs.entries() if entry.parameters]
    assert len(signed) > 1000
    for entry in signed:
        ast.parse(f"def f{entry.signature}: ...")
        assert "self" not in [parameter.name for parameter in entry.parameters[:1]], entry.qualname


def test_entries_are_sorted_and_each_says_something() -> None:
    entries = python_docs.entries()
    assert [e.qualname for e in entries] == sorted({e.qualname for e in entries})
    assert all(entry.body.startswith(entry.summary) and len(entry.body) >= 12 for entry in entries)
    assert {entry.kind for entry in entries} >= {"module", "class", "function", "method", "property"}


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="no split 'validation'; use one of train and test"):
        next(python_docs.build("validation"))


def test_the_fingerprint_follows_the_python_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = python_docs.fingerprint()
    assert python_docs.fingerprint() == before
    monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    assert python_docs.fingerprint() != before


@pytest.mark.parametrize(
    ("source", "cleaned"),
    [
        ("A :class:`Foo` of :func:`~os.path.join`, see :pep:`8`.", ["A `Foo` of `join`, see PEP 8."]),
        ("Use ``x`` or `the docs <http://a.b>`_.", ["Use `x` or the docs (http://a.b)."]),
        ("Give ``(', ', ': ')`` or `x`.", ["Give `(', ', ': ')` or `x`."]),
        ("The `old' way of 'quoting'.", ["The `old` way of 'quoting'."]),
        ("Text::\n\n    run this --now\n\nMore.", ["Text:", "```\nrun this --now\n```", "More."]),
        ("Sum:\n\n>>> 1 + 1\n2\n\n>>> 3\n3\n\nDone.", ["Sum:", "```python\n>>> 1 + 1\n2\n\n>>> 3\n3\n```", "Done."]),
        (".. versionadded:: 3.2\n\n.. note:: Be careful.", ["New in version 3.2.", "Note: Be careful."]),
        (":param a: the first\n:returns: a sum", ["- `a`: the first\nReturns: a sum"]),
        ("a -- first\n\nb -- second", ["- `a`: first\n- `b`: second"]),
        ("Title\n=====\n\nText.", ["**Title**", "Text."]),
        ("bad\x00 \ud800chars", ["bad chars"]),
        (f"{'word ' * 12}\nand  on.", [f"{'word ' * 12}and  on."]),
    ],
)
def test_docstrings_become_markdown(source: str, cleaned: list[str]) -> None:
    assert blocks(source) == cleaned


def test_long_texts_end_at_a_paragraph() -> None:
    parts = ["First.", "```python\na\n\nb\n```", "It goes on:", "x" * 100]
    assert split_blocks("\n\n".join(parts)) == parts
    assert cut(parts, 60) == parts[:2]
    assert cut(["One sentence. Another one that is too long."], 20) == ["One sentence."]


@pytest.mark.parametrize("doc", ["", "Foo.", "Return x", "See base class.", "f(x) -> y", "```"])
def test_docstrings_that_say_nothing_are_dropped(doc: str) -> None:
    assert make_entry("m.f", "function", "m", doc) is None
