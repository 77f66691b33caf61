"""What becomes of rows that are too long, of responses too short or long, and of equal conversations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import DataSection
from sft_dist.data.account import summary_lines
from sft_dist.data.digests import overlap
from sft_dist.data.lengths import Verdict, cut
from sft_dist.data.masking import Masked
from sft_dist.data.overlap import overlap_of_sources
from sft_dist.data.sources import open_source
from sft_dist.errors import DataError
from tests.recipes import write_conversations
from tests.unit.test_prepare import prepared, recipe_for

ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))


def masked(rows: list[list[bool]]) -> Masked:
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Masked(np.arange(starts[-1], dtype=np.int32), np.concatenate([np.array(row) for row in rows]), starts)


def data(**settings: Any) -> DataSection:
    return DataSection(dataset_name="x", **settings)


@given(ROWS, st.integers(2, 20), st.sampled_from(["keep_start", "keep_end", "drop", "split"]))
def test_every_mode_keeps_the_tokens_that_it_promises(rows: list[list[bool]], length: int, mode: str) -> None:
    found = cut(masked(rows), data(truncation_mode=mode), length)
    starts = np.cumsum([0, *map(len, rows)])
    kept: dict[int, list[tuple[int, int]]] = {}
    for begin, end, record in zip(found.begins, found.ends, found.record, strict=True):
        assert 0 < end - begin <= length
        kept.setdefault(int(record), []).append((int(begin - starts[record]), int(end - starts[record])))
    for number, row in enumerate(rows):
        long, size = len(row) > length, len(row)
        parts = {"keep_start": [(0, min(size, length))], "keep_end": [(max(0, size - length), size)],
                 "drop": [] if long else [(0, size)]}  # fmt: skip
        if mode == "split":
            pieces = kept.get(number, [])
            if pieces:
                assert pieces[0][0] == 0 and pieces[-1][1] == size
                assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        elif found.verdicts[number] == Verdict.ROWS:
            assert kept[number] == parts[mode]
        # The first token of a row is predicted by nothing.
        learnt = [sum(row[begin + 1 : end]) for begin, end in (kept.get(number) or parts.get(mode) or [(0, size)])]
        if found.verdicts[number] == Verdict.UNTRAINED and mode != "split":
            assert sum(learnt) == 0
        if number in kept:
            assert found.trained[found.record == number].tolist() == learnt
    assert (found.verdicts == Verdict.TOO_LONG).tolist() == [mode == "drop" and len(row) > length for row in rows]


def test_responses_out_of_bounds_are_left_out_and_counted(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 40)
    every, _ = prepared(recipe_for(file), 256)
    some, _ = prepared(recipe_for(file, min_response_length=8, max_response_length=60), 256)
    trained = np.array(every.rows["trained"][:])
    inside = (trained >= 8) & (trained <= 60)
    assert 0 < inside.sum() < len(inside)
    assert some.rows["where"][:] == [where for where, ok in zip(every.rows["where"], inside, strict=True) if ok]
    account = some.account
    assert (account.too_short_response, account.too_long_response) == ((trained < 8).sum(), (trained > 60).sum())
    said = " ".join(summary_lines("train", account))
    assert f"{account.too_short_response} below data.min_response_length" in said


def test_equal_conversations_are_left_out_on_demand_the_first_one_kept(tmp_path: Path) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 10)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[3], *lines[:2]]) + "\n")
    every, _ = prepared(recipe_for(file))
    once, _ = prepared(recipe_for(file, deduplicate=True))
    assert (len(every.rows), len(once.rows), once.account.duplicates) == (13, 10, 3)
    assert once.rows["where"][:] == every.rows["where"][:10]


def test_plain_text_is_split_and_a_conversation_is_not(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox " * 60}) + "\n")
    train, _ = prepared(recipe_for(text, truncation_mode="split"), 32)
    whole, _ = prepared(recipe_for(text), 4096)
    assert len(train.rows) > 3 and train.account.split == 1
    assert [i for ids in train.rows["input_ids"][:] for i in ids] == whole.rows["input_ids"][0]
    chat = write_conversations(tmp_path / "a.jsonl", 40)
    with pytest.raises(DataError, match=r"data\.truncation_mode: .*a\.jsonl:\d+: a conversation of \d+ tokens"):
        prepared(recipe_for(chat, truncation_mode="split"), 32)


def test_a_held_out_record_that_is_trained_on_is_named(tmp_path: Path) -> None:
    train, test = write_conversations(tmp_path / "a.jsonl", 12), write_conversations(tmp_path / "b.jsonl", 5, seed=9)
    lines = test.read_text().splitlines()
    test.write_text("\n".join([*lines, train.read_text().splitlines()[6]]) + "\n")
    rows = [prepared(recipe_for(file))[0].rows for file in (train, test)]
    assert overlap(*rows) == [(f"{test}:6", f"{train}:7")]
    sources = [(open_source(recipe_for(file).data, "train"), recipe_for(file).data) for file in (test, train)]
    found = overlap_of_sources(sources[0], sources[1:])
    assert found.line() == (
        f"1 of 6 held-out records also stands in the training data (first: {test}:6 = {train}:7), so that the measure "
        "flatters the model; remove them from one side"
    )
    assert overlap_of_sources(sources[0], sources[:0]).line() is None
