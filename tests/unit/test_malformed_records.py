"""A thousand malformed records, drawn from seeds: each is skipped and named, or refused, by its file and line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.errors import DataError
from tests.unit.test_prepare import prepared, recipe_for

COUNT = 1000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))


def good(draw: random.Random) -> dict[str, Any]:
    turns = []
    for number in range(draw.randint(1, 3)):
        turns.append({"from": "human", "value": f"question {number} {draw.random()}"})
        turns.append({"from": "gpt", "value": f"answer {number} {draw.random()}"})
    return {"conversations": turns}


def _turn(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[Any, random.Random], str]:
    def mutated(record: Any, draw: random.Random) -> str:
        change(draw.choice(record["conversations"]), draw)
        return json.dumps(record)

    return mutated


def _whole(change: Callable[[Any, random.Random], Any]) -> Callable[[Any, random.Random], str]:
    return lambda record, draw: json.dumps(change(record, draw))


NOT_TEXT = [None, 3, 1.5, True, [], ["a"], {}, {"a": "b"}, [[]], 10**400]
# Whatever of a good record is put into them, none of these makes a record that could be trained on.
MUTATIONS: dict[str, Callable[[Any, random.Random], str]] = {
    "value of another type": _turn(lambda turn, draw: turn.update(value=draw.choice(NOT_TEXT))),
    "role of another type": _turn(lambda turn, draw: turn.update({"from": draw.choice(NOT_TEXT)})),
    "no value": _turn(lambda turn, draw: turn.pop("value")),
    "no role": _turn(lambda turn, draw: turn.pop("from")),
    "unknown role": _turn(lambda turn, draw: turn.update({"from": draw.choice(["robot", "", "gpt2", "Humans", "\t"])})),
    "NUL": _turn(lambda turn, draw: turn.update(value=turn["value"][: draw.randint(0, 9)] + "\0")),
    "lone surrogate": _turn(lambda turn, draw: turn.update(value="a\ud800" + turn["value"])),
    "turns of another type": _whole(lambda record, draw: {"conversations": draw.choice([*NOT_TEXT, "text"])}),
    "turn of another type": _whole(lambda record, draw: {"conversations": [draw.choice([1, "a", None, [], 2.5])] * 2}),
    "answer first": _whole(lambda record, draw: {"conversations": record["conversations"][1:]}),
    "twice the same role": _whole(
        lambda record, draw: {"conversations": [record["conversations"][0], *record["conversations"]]}
    ),
    "no answer": _whole(lambda record, draw: {"conversations": record["conversations"][:1]}),
    "empty answers": _whole(
        lambda record, draw: {
            "conversations": [
                {**turn, "value": draw.choice(["", " ", "\n"])} if turn["from"] == "gpt" else turn
                for turn in record["conversations"]
            ]
        }
    ),
    "empty question": _whole(
        lambda record, draw: {"conversations": [{"from": "human", "value": " \n"}, *record["conversations"][1:]]}
    ),
    "other columns": _whole(lambda record, draw: {f"column {draw.random()}": record["conversations"]}),
    "no columns": _whole(lambda record, draw: {}),
    "no object": _whole(lambda record, draw: draw.choice([1, "a", None, [record], True, 2.5])),
    "cut off": lambda record, draw: (text := json.dumps(record))[: draw.randint(1, len(text) - 1)],
    "stray comma": lambda record, draw: json.dumps(record)[:-1] + ",}",
    "nested deeply": lambda record, draw: '{"conversations": ' + "[" * 5000 + "]" * 5000 + "}",
    "huge number": lambda record, draw: '{"conversations": ' + "9" * 5000 + "}",
}


def malformed(seed: int) -> tuple[str, str]:
    draw = random.Random(seed)
    name = sorted(MUTATIONS)[seed % len(MUTATIONS)]
    return name, MUTATIONS[name](good(draw), draw)


def written(path: Path) -> list[int]:
    """A file of good and malformed records in turn; gives the lines of the malformed ones."""
    lines, bad = [json.dumps(good(random.Random(-1)))], []
    for seed in range(COUNT):
        lines.append(malformed(seed)[1])
        bad.append(len(lines))
        lines.append(json.dumps(good(random.Random(-seed - 2))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return bad


def test_each_is_skipped_counted_and_named_and_every_good_one_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    bad = written(file)
    train, _ = prepared(recipe_for(file, max_bad_records=COUNT), 4096)
    assert train.account.records == 2 * COUNT + 1
    wheres = [f"{file}:{line}" for line in range(1, 2 * COUNT + 2) if line not in set(bad)]
    assert train.rows["where"][:] == wheres
    assert train.account.bad_count == COUNT
    assert [line.split(": ")[0] for line in train.account.bad] == [f"{file}:{line}" for line in bad[:100]]
    assert all("\n" not in line and len(line) < 700 for line in train.account.bad)


@pytest.mark.parametrize("seed", range(2 * len(MUTATIONS)))
def test_one_alone_is_refused_by_its_line(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "a.jsonl"
    name, text = malformed(seed)
    file.write_text(f"{json.dumps(good(random.Random(0)))}\n{text}\n", encoding="utf-8")
    with pytest.raises(DataError) as refused:
        prepared(recipe_for(file))
    assert str(refused.value).startswith(f"{file}:2: "), name
    assert "\n" not in str(refused.value)
