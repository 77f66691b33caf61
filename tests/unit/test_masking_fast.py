"""Tokens and masks from the vocabulary's lengths equal those from the tokenizer's own offsets, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sft_dist.config import DataSection
from sft_dist.data.borders import UNSURE, byte_lengths
from sft_dist.data.formats import Turn
from sft_dist.data.masking import Masked, Masker
from sft_dist.data.template import ChatTemplate, Rendered, load_template
from tests import tiny

# Llama-3's and Qwen's: newlines stay with the punctuation before them, white space is cut before a word.
_SPLIT = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def rebuilt(change: Callable[[Tokenizer], None], template: str | None = tiny.CHATML) -> PreTrainedTokenizerFast:
    tokenizer = tiny.chat_tokenizer(template)
    change(tokenizer.backend_tokenizer)
    return tokenizer


def _in_llamas_manner(backend: Tokenizer) -> None:
    cutting = pre_tokenizers.Split(_SPLIT, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cutting, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)


def _normalizing(backend: Tokenizer) -> None:
    _in_llamas_manner(backend)
    backend.normalizer = normalizers.NFC()


def _with_odd_added_tokens(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("<pad me>", lstrip=True, rstrip=True), AddedToken("é¿"), AddedToken("\n\n\n")])


def _prefixing(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny.chat_tokenizer,
    "byte-level, contents trimmed": lambda: tiny.chat_tokenizer(tiny.LLAMA2),
    "OPT, offsets trimmed": tiny.opt_tokenizer,
    "Llama-3's cuts, offsets trimmed": lambda: rebuilt(_in_llamas_manner),
    "Qwen's normalizer": lambda: rebuilt(_normalizing),
    "odd added tokens": lambda: rebuilt(_with_odd_added_tokens),
    "space in front": lambda: rebuilt(_prefixing),
    "SentencePiece": tiny.llama_tokenizer,
}
TEMPLATES = {name: load_template(make(), DataSection(dataset_name="x")) for name, make in TOKENIZERS.items()}
SLOW = {name: Masker(template.tokenizer) for name, template in TEMPLATES.items()}
FAST = {name: Masker(template.tokenizer, warm=True) for name, template in TEMPLATES.items()}

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
pieces = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "</s>", "[/INST]", "\n\n", "\n\n\n", " ", "  ", "\t ", "\n ", ".\n\n", " <pad me> ",
     "é¿", "e\u0301", "\u0301", "\U0001f468\u200d\U0001f469", "你好", "\u00a0", "\u0085", "12345", "the quick", "\x12"]
)  # fmt: skip
contents = st.lists(words | pieces, min_size=1, max_size=6).map("".join)
dialogues = st.lists(st.tuples(contents.filter(str.strip), contents | st.just("")), min_size=1, max_size=3)


def by_offsets(name: str, rows: list[Rendered], raw: bool = False) -> Masked:
    masker = SLOW[name]
    return masker._around(rows, masker._slow(rows), raw)


def assert_equal(found: Masked, expected: Masked) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def rendered(template: ChatTemplate, pairs: list[tuple[str, str]]) -> Rendered | None:
    turns = [turn for question, answer in pairs for turn in (Turn("user", question), Turn("assistant", answer))]
    (row,) = template.render_all([tuple(turns)])
    return row if isinstance(row, Rendered) else None


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(dialogues, min_size=1, max_size=4))
def test_conversations_are_masked_alike(name: str, conversations: list[list[tuple[str, str]]]) -> None:
    found = [row for pairs in conversations if (row := rendered(TEMPLATES[name], pairs)) is not None]
    assert_equal(FAST[name].whole(found), by_offsets(name, found))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(st.lists(contents, min_size=1, max_size=4))
def test_plain_texts_are_masked_alike(name: str, texts: list[str]) -> None:
    rows = [Rendered(text, ((0, len(text)),), append_eos=True) for text in texts]
    assert_equal(FAST[name].whole(rows, raw=True), by_offsets(name, rows, raw=True))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(contents, st.data())
def test_any_spans_are_masked_alike(name: str, text: str, data: st.DataObject) -> None:
    """Spans that cut words, characters of several bytes beside them, empty ones and touching ones."""
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6).filter(lambda b: len(b) % 2 == 0)))
    rows = [Rendered(text, tuple(zip(borders[::2], borders[1::2], strict=True)), append_eos=False)] * 2
    assert_equal(FAST[name].whole(rows), by_offsets(name, rows))


def test_the_fast_way_is_taken_where_it_is_meant_to_be() -> None:
    shown = {name: byte_lengths(template.tokenizer.backend_tokenizer) for name, template in TEMPLATES.items()}
    assert {name for name, table in shown.items() if table is None} == {"space in front", "SentencePiece"}
    plain = shown["byte-level"]
    assert plain is not None and (plain.table == UNSURE).sum() == 0
    odd = shown["odd added tokens"]
    # One stands for more than it says, and the letters of the other are those by which two bytes are written, too.
    assert odd is not None and (odd.table == UNSURE).sum() == 2


def test_ordinary_rows_are_not_asked_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    masker = Masker(TEMPLATES["byte-level"].tokenizer, warm=True)
    monkeypatch.setattr(masker, "_slow", lambda rows: pytest.fail("asked") if rows else [])
    row = rendered(TEMPLATES["byte-level"], [("What is 1 + 1?", "Two – 二."), ("And 2 + 2?", "Four.")])
    assert row is not None
    masker.whole([row] * 3)


def test_a_masker_comes_through_a_pickle_set_up_for_work() -> None:
    copy = pickle.loads(pickle.dumps(Masker(TEMPLATES["byte-level"].tokenizer, 7)))
    row = rendered(TEMPLATES["byte-level"], [("a", "b c d")])
    assert row is not None and copy.max_length == 7
    assert_equal(copy.whole([row]), by_offsets("byte-level", [row]))
