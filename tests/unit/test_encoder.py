"""The faster encoder is used where it gives the tokenizer's own ids, and left where it once does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.data import encoder, masking
from sft_dist.data.account import summary_lines
from sft_dist.data.encoder import FAST, PLAIN, EncoderDiffers, FastEncoder, PlainEncoder, choose, probes
from tests import tiny
from tests.recipes import write_conversations
from tests.unit.test_prepare import prepared, recipe_for


class Wrong:
    """Stands for `fastokens.Tokenizer`; from the text that holds `after` on it gives other ids."""

    after = ""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(text)
        self.is_wrong = not self.after

    @classmethod
    def from_json_str(cls, text: str) -> Wrong:
        return cls(text)

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        rows = []
        for text in texts:
            self.is_wrong = self.is_wrong or self.after in text
            ids = self.backend.encode(text, add_special_tokens=False).ids
            rows.append(np.array([*ids, 1] if self.is_wrong else ids, np.uint32))
        starts = np.cumsum([0, *map(len, rows)]).astype(np.uint64)
        return np.concatenate(rows).tobytes(), starts.tobytes()


def test_a_text_that_it_refuses_is_given_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses bytes that the vocabulary lacks, and takes the rest of the batch with them."""

    def refusing(texts: list[str]) -> None:
        raise ValueError("byte 0xf1 has no token in vocabulary")

    put_in_place(monkeypatch, after="never")
    fast = FastEncoder(tiny.chat_tokenizer())
    monkeypatch.setattr(fast._fast, "encode_batch_flat", refusing)
    for ours, theirs in zip(fast(["a", "\U00040000"]), fast.plain(["a", "\U00040000"]), strict=True):
        assert np.array_equal(ours, theirs)
    monkeypatch.setattr(Wrong, "encode_batch_flat", lambda self, texts: refusing(texts))
    assert choose(tiny.chat_tokenizer()).name == PLAIN


@pytest.fixture
def tokenizers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)


def put_in_place(monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    monkeypatch.setattr(Wrong, "after", after)
    monkeypatch.setitem(sys.modules, "fastokens", type("fastokens", (), {"Tokenizer": Wrong}))


def test_both_give_the_same_ids_for_awkward_texts() -> None:
    pytest.importorskip("fastokens")
    tokenizer = tiny.chat_tokenizer()
    assert choose(tokenizer).name == FAST
    texts = probes(tokenizer)
    for ours, theirs in zip(FastEncoder(tokenizer)(texts), PlainEncoder(tokenizer)(texts), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_without_it_or_where_it_is_left_out_the_tokenizer_is_used(
    tokenizers_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(tiny.chat_tokenizer()).name == PLAIN
    monkeypatch.undo()
    assert choose(tiny.chat_tokenizer(), fast=False).name == PLAIN
    monkeypatch.setenv("SFT_DIST_FASTOKENS", "0")
    assert choose(tiny.chat_tokenizer()).name == PLAIN


def test_one_that_is_wrong_from_the_start_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, after="")
    assert choose(tiny.chat_tokenizer()).name == PLAIN


def test_every_text_is_looked_at_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, after="never")
    fast = FastEncoder(tiny.chat_tokenizer())
    looked_at: set[int] = set()
    monkeypatch.setattr(fast, "check", lambda texts, encoded, numbers: looked_at.update(numbers))
    for _ in range(encoder.CHECK_EVERY):
        fast(["a"] * 120)
    assert looked_at == set(range(120))
    monkeypatch.undo()
    put_in_place(monkeypatch, after="poison")
    with pytest.raises(EncoderDiffers):
        FastEncoder(tiny.chat_tokenizer())(["poison"])


def test_one_that_turns_out_wrong_later_costs_time_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is made anew by the tokenizer itself, and a line says so."""
    file = write_conversations(tmp_path / "a.jsonl", 400)
    lines = file.read_text().splitlines()
    lines[200] = json.dumps({"conversations": [{"from": "human", "value": "poison"}, {"from": "gpt", "value": "x"}]})
    file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(masking, "WORTH_A_TABLE", 16)
    monkeypatch.setattr(masking, "WORTH_AN_ENCODER", 16)
    monkeypatch.setattr("sft_dist.data.pool.BATCH", 32)

    def rows(cache: str) -> Any:
        monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / cache))
        return prepared(recipe_for(file, dataset_num_proc=1))[0]

    monkeypatch.setenv("SFT_DIST_FASTOKENS", "0")
    plain = rows("plain")
    monkeypatch.delenv("SFT_DIST_FASTOKENS")
    put_in_place(monkeypatch, after="poison")
    found = rows("wrong")
    assert found.rows.to_list() == plain.rows.to_list()
    assert plain.account.encoder == PLAIN
    assert found.account.encoder == f"{PLAIN}, since {FAST} gave other ids"
    assert any(f"{FAST} gave other ids" in line for line in summary_lines("train", found.account))
    assert not any(FAST in line for line in summary_lines("train", plain.account))
