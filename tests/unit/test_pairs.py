"""Preference records of every format become one pair, and a pair becomes rows that are what the model sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config import Recipe
from sft_dist.data.formats import Fault, Turn
from sft_dist.data.pair_formats import Pair, parse_pair
from sft_dist.data.pairs import prepare_pairs
from sft_dist.data.rows import turns_of
from sft_dist.data.template import load_template
from sft_dist.errors import DataError
from tests import tiny

ASK, SYSTEM = Turn("user", "Why?"), Turn("system", "Be brief.")
GOOD = Pair((ASK,), "Because.", "No idea.")
Q, A, B = (
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "Because."},
    {"from": "gpt", "value": "No idea."},
)
QC, AC, BC = ({"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in (Q, A, B))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        {"prompt": [QC], "chosen": [AC], "rejected": [BC]},
        {"prompt": "Why?", "chosen": [QC, AC], "rejected": [QC, BC]},
        {"chosen": [QC, AC], "rejected": [Q, B]},
        {"conversations": [Q], "chosen": A, "rejected": B},
        {"conversations": [[Q]], "chosen": "Because.", "rejected": [B]},
        {"messages": [QC], "chosen": AC, "rejected": BC},
        {"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No idea."},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No idea."},
    ],
)
def test_every_format_is_the_same_pair(record: dict[str, Any]) -> None:
    assert parse_pair(record) == GOOD


def test_several_turns_a_system_text_and_a_margin_are_kept() -> None:
    more = [QC, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "Why not?"}]
    pair = parse_pair({"system": "Be brief.", "prompt": more, "chosen": "a", "rejected": "b", "margin": 2})
    assert pair.prompt == (SYSTEM, ASK, Turn("assistant", "What?"), Turn("user", "Why not?"))
    assert pair.margin == 2.0
    both = [{"role": "system", "content": "Be brief."}, QC]
    assert parse_pair({"prompt": both, "chosen": [QC, AC], "rejected": [QC, BC]}).prompt == (SYSTEM, ASK)


def test_texts_share_their_beginning_up_to_a_word() -> None:
    pair = parse_pair({"chosen": "The sum is fortune", "rejected": "The sum is forty"})
    assert pair == Pair((Turn("text", "The sum is"),), " fortune", " forty")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rejected": ...}, "the column rejected is missing (it has prompt, chosen)"),
        ({"rejected": None}, "rejected is missing: a pair has two answers"),
        ({"chosen": " "}, "chosen is empty: a pair has two answers"),
        ({"chosen": []}, "chosen is empty: a pair has two answers"),
        ({"chosen": 3}, "chosen must be a list of turns, got int"),
        ({"rejected": "Because. "}, "chosen and rejected are equal, so that nothing is preferred"),
        ({"margin": "2"}, "margin must be a finite number, got '2'"),
        ({"margin": float("nan")}, "margin must be a finite number, got nan"),
        ({"prompt": ...}, "chosen and rejected have no beginning in common that is their prompt; add a column prompt"),
        ({"prompt": ..., "chosen": A}, "chosen is an answer without a prompt; add a column prompt"),
        ({"chosen": [QC]}, "chosen ends with a turn of the user, where the answer must stand"),
        ({"prompt": "Who?", "chosen": [QC, AC]}, "chosen begins with another prompt than the record's own"),
        ({"prompt": ..., "chosen": [QC, AC], "rejected": [{"role": "user", "content": "Who?"}, BC]},
         "chosen and rejected differ in turn 1, which is not their last; cut them to one prompt"),
        ({"chosen": {"from": "robot", "value": "a"}}, "chosen: turn 1 has the unknown role 'robot'"),
        ({"prompt": [QC, AC]}, "chosen: turn 3 is of the assistant where one of the user must stand"),
        ({"prompt": 3}, "prompt must be a string, got int"),
        ({"chosen": "a\0"}, "chosen holds a NUL byte at character 2"),
    ],
)  # fmt: skip
def test_a_fault_says_what_is_wrong(change: dict[str, Any], fault: str) -> None:
    record = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea.", **change}
    with pytest.raises(Fault) as raised:
        parse_pair({name: value for name, value in record.items() if value is not ...})
    assert str(raised.value).startswith(fault)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))


def recipe_of(folder: Path, records: list[dict[str, Any]], **data: Any) -> Recipe:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": str(file), **data},
            "output": {"output_dir": "run"},
        }
    )


TOKENIZERS = {"chatml": tiny.chat_tokenizer, "opt": tiny.opt_tokenizer, "llama": tiny.llama_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_are_the_generation_prompt_and_what_follows_it(tmp_path: Path, name: str) -> None:
    answers = ["Paris.", "\n\nIt returns  a list", "é ü 你好", " indented\n"]
    records = [
        {"prompt": prompt, "chosen": answer, "rejected": f"{answer} x"}
        for prompt in ("What is it?", "two\n\n", "def add(a, b):\n")
        for answer in answers
    ]
    tokenizer = TOKENIZERS[name]()
    recipe = recipe_of(tmp_path, records)
    template = load_template(tokenizer, recipe.data)
    train, _ = prepare_pairs(recipe, template, 256)
    assert len(train.rows) == len(records)
    for row in train.rows:
        turns = turns_of(row)
        assert row["prompt_ids"] == tokenizer(template.prompt(turns), add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            expected = template.render((*turns, Turn("assistant", row[side])))
            assert expected.text[: expected.spans[-1][1]].replace(" ", "") == text.replace(" ", "")
        assert row["length"] == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert row["tokens"] == 2 * len(row["prompt_ids"]) + row["trained"]
    assert train.account.tokens == sum(train.rows["tokens"])


def test_a_pair_too_long_is_left_out_and_never_cut(tmp_path: Path) -> None:
    long = "a list of strings " * 20
    records = [
        {"prompt": "Why?", "chosen": "a", "rejected": "b", "margin": 1.5},
        {"prompt": "Why?", "chosen": f"{long} a", "rejected": f"{long} b"},
        {"prompt": "Why?", "chosen": "a", "rejected": long},
    ]
    recipe = recipe_of(tmp_path, records)
    template = load_template(tiny.chat_tokenizer(), recipe.data)
    train, _ = prepare_pairs(recipe, template, 40)
    assert train.rows["margin"][:] == [1.5]
    assert (train.account.rows, train.account.too_long, train.account.format) == (1, 2, "preference")
    train, _ = prepare_pairs(recipe, template, None)
    assert train.rows["margin"][:] == [1.5, None, None]


def test_a_bad_pair_is_named_and_skipped_where_that_is_allowed(tmp_path: Path) -> None:
    good = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    records = [good, {**good, "chosen": " x ", "rejected": "x"}, {"prompt": "Why?", "chosen": "a"}, good]
    recipe = recipe_of(tmp_path, records)
    template = load_template(tiny.chat_tokenizer(), recipe.data)
    with pytest.raises(DataError) as raised:
        prepare_pairs(recipe, template, 64)
    assert "pairs.jsonl:2: chosen and rejected are equal" in str(raised.value)
    recipe = recipe_of(tmp_path, records, max_bad_records=2, deduplicate=True, test_split_size=0)
    train, _ = prepare_pairs(recipe, template, 64)
    account = train.account
    assert (account.records, account.bad_count, account.duplicates, account.rows) == (4, 2, 1, 1)
    assert "pairs.jsonl:3: the column rejected is missing" in account.bad[1]


def test_sides_that_a_template_makes_equal_are_a_fault(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [{"prompt": "Why?", "chosen": "a\u00a0", "rejected": "a\u2003b"}])
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = tiny.CHATML.replace(
        "message['content']", "(message['content'] | replace('\u2003b', '\u00a0'))"
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: chosen and rejected are equal as tokens"):
        prepare_pairs(recipe, load_template(tokenizer, recipe.data), 64)


def test_pairs_are_held_out_and_mixed_as_conversations_are(tmp_path: Path) -> None:
    records = [{"prompt": f"Why {i}?", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(10)]
    recipe = recipe_of(tmp_path, records, test_split_size=3)
    template = load_template(tiny.chat_tokenizer(), recipe.data)
    train, held_out = prepare_pairs(recipe, template, 64)
    assert held_out is not None
    assert sorted(train.rows["chosen"][:] + held_out.rows["chosen"][:]) == [f"a {i}" for i in range(10)]
    assert train.account.tokens == sum(train.rows["tokens"])
    part = {"dataset_name": recipe.data.dataset_name}
    mixed = recipe.model_copy(update={"data": recipe.data.model_validate({"mixture": {"a": part, "b": part}})})
    both, _ = prepare_pairs(mixed, template, 64)
    assert both.mixture is not None
    assert both.sources == {"a": 0, "b": 10}
