"""Prepared rows: made once, complete or absent, remade when what they depend on changes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config import Recipe
from sft_dist.data import rows as module
from sft_dist.data.prepare import prepare
from sft_dist.data.rows import turns_of
from sft_dist.data.template import load_template
from sft_dist.errors import DataError
from sft_dist.paths import locked
from tests import tiny
from tests.recipes import write_conversations


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))


def recipe_for(file: Path, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": str(file), **data},
            "output": {"output_dir": "run"},
        }
    )


def prepared(recipe: Recipe, max_length: int | None = 64) -> tuple[module.Prepared, module.Prepared | None]:
    return prepare(recipe, load_template(tiny.chat_tokenizer(), recipe.data), max_length)


def test_rows_keep_their_conversation_and_the_account_adds_up(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 20)
    train, held_out = prepared(recipe_for(file))
    assert held_out is None
    first = json.loads(file.read_text().splitlines()[0])["conversations"]
    assert [turn.content for turn in turns_of(train.rows[0])] == [turn["value"] for turn in first]
    account = train.account
    assert account.rows == len(train.rows) == 20
    assert account.tokens == sum(map(len, train.rows["input_ids"]))
    assert train.rows["length"][:] == [len(row) for row in train.rows["input_ids"]]
    assert train.rows["trained"][:] == [sum(label != -100 for label in row) for row in train.rows["labels"]]
    assert account.trained_tokens == sum(label != -100 for row in train.rows["labels"] for label in row)
    assert account.truncated == sum(len(row) == 64 for row in train.rows["input_ids"])
    assert max(map(len, train.rows["input_ids"])) == 64


def test_a_second_start_reads_what_the_first_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(write_conversations(tmp_path / "a.jsonl", 5))
    first, _ = prepared(recipe)
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("prepared twice"))
    again, _ = prepared(recipe)
    assert again.rows["input_ids"][:] == first.rows["input_ids"][:]
    assert again.account == first.account


def test_what_the_rows_depend_on_makes_them_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 5)
    built: list[str] = []
    real = module._build
    monkeypatch.setattr(module, "_build", lambda folder, *rest: (built.append(folder.name), real(folder, *rest)))
    prepared(recipe_for(file))
    prepared(recipe_for(file), max_length=32)
    prepared(recipe_for(file, max_bad_records=1))
    prepared(recipe_for(file, instruction_template="Q: ", response_template="A: "))
    write_conversations(file, 6, seed=3)
    prepared(recipe_for(file))
    assert len(set(built)) == len(built) == 5


def test_what_a_killed_preparation_left_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(write_conversations(tmp_path / "a.jsonl", 5))

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", killed)
        with pytest.raises(SystemExit):
            prepared(recipe)
    left = list((tmp_path / "cache" / "rows").glob("*.unfinished"))
    assert left
    train, _ = prepared(recipe)
    assert len(train.rows) == 5
    assert not list((tmp_path / "cache" / "rows").glob("*.unfinished"))


def test_what_killed_preparations_of_other_rows_left_is_removed_and_what_goes_on_is_not(tmp_path: Path) -> None:
    rows = tmp_path / "cache" / "rows"
    left, underway = rows / "left.unfinished", rows / "underway.unfinished"
    for folder in (left, underway):
        folder.mkdir(parents=True)
        (folder / "rows.arrow").write_bytes(b"x")
    with locked(rows / "underway"):
        prepared(recipe_for(write_conversations(tmp_path / "a.jsonl", 5)))
    assert not left.exists()
    assert underway.exists()


def _prepare_and_count(file: Path, results: Any) -> None:
    train, _ = prepared(recipe_for(file))
    results.put((len(train.rows), train.account.tokens))


def test_processes_that_start_together_get_the_same_rows(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 200)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_prepare_and_count, args=(file, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert len(list((tmp_path / "cache" / "rows").glob("*/rows.arrow"))) == 1


@pytest.mark.parametrize(("size", "held"), [(0.25, 5), (3, 3)])
def test_held_out_rows_are_drawn_by_the_seed_and_not_trained_on(tmp_path: Path, size: float, held: int) -> None:
    recipe = recipe_for(write_conversations(tmp_path / "a.jsonl", 20), test_split_size=size)
    train, test = prepared(recipe)
    assert test is not None
    assert (len(train.rows), len(test.rows)) == (20 - held, held)
    assert not set(train.rows["where"]) & set(test.rows["where"])
    again = prepared(recipe)[1]
    assert again is not None
    assert again.rows["where"][:] == test.rows["where"][:]
    assert test.account.tokens == sum(map(len, test.rows["input_ids"]))
    assert train.account.rows == 20 - held


def test_a_hold_out_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(write_conversations(tmp_path / "a.jsonl", 4), test_split_size=4)
    with pytest.raises(DataError, match=r"data\.test_split_size: 4 of 4 rows leaves one side empty; change it"):
        prepared(recipe)


def test_a_record_in_which_nothing_is_trained_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [[("human", "q " * 80), ("gpt", "never reached")], [("human", "q"), ("gpt", "short")]]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"conversations": [{"from": f, "value": v} for f, v in row]}) + "\n" for row in rows)
    )
    train, _ = prepared(recipe_for(file))
    assert len(train.rows) == 1
    assert train.account.untrained == [f"{file}:1"]


def test_only_the_first_records_are_taken_where_the_recipe_says_so(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 9)
    train, test = prepared(recipe_for(file, max_train_records=4, dataset_test_split=str(file), max_eval_records=2))
    assert test is not None
    assert (len(train.rows), len(test.rows)) == (4, 2)
