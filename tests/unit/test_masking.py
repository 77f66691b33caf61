"""Loss on the responses only: exactly their tokens are trained, under any template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sft_dist.config import DataSection
from sft_dist.data.formats import Conversation, Fault, Turn
from sft_dist.data.masking import IGNORE, Masker, Tokens, covered, mask
from sft_dist.data.template import ChatTemplate, load_template, stop_token_ids
from sft_dist.errors import DataError
from tests import tiny

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": tiny.chat_tokenizer,
    "chatml with generation tags": lambda: tiny.chat_tokenizer(tiny.CHATML_GENERATION),
    "llama-2 on byte-level BPE": lambda: tiny.chat_tokenizer(tiny.LLAMA2),
    "llama-2 on SentencePiece": tiny.llama_tokenizer,
    "OPT, no template": tiny.opt_tokenizer,
    "Llama, no template": lambda: tiny.llama_tokenizer(None),
}
CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "What is the capital of France?"),
    Turn("assistant", "Paris."),
    Turn("user", "And of Italy?"),
    Turn("assistant", "It is Rome."),
)


def loaded(name: str, data: DataSection | None = None) -> ChatTemplate:
    return load_template(TOKENIZERS[name](), data or DataSection(dataset_name="x"))


def row(template: ChatTemplate, turns: Conversation, max_length: int | None = None) -> Tokens:
    rendered = template.render(turns)
    return Masker(template.tokenizer, max_length)([rendered], raw=turns[0].role == "text")[0]


def trained_texts(template: ChatTemplate, tokens: Tokens) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = [[]]
    for label in tokens.labels:
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [template.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_response_is_trained_with_its_end_and_nothing_else(name: str) -> None:
    template = loaded(name)
    texts = trained_texts(template, row(template, CONVERSATION))
    eos = template.tokenizer.eos_token
    assert [text.replace(eos, "").strip() for text in texts] == ["Paris.", "It is Rome."]
    assert all(text.endswith(eos) for text in texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_the_ids_or_ignored_and_the_first_token_is_never_trained(name: str) -> None:
    tokens = row(loaded(name), CONVERSATION)
    assert len(tokens.input_ids) == len(tokens.labels)
    assert all(label in (IGNORE, token) for label, token in zip(tokens.labels, tokens.input_ids, strict=True))
    assert tokens.labels[0] == IGNORE


def test_the_mask_equals_that_of_an_author_who_marked_the_template() -> None:
    marked = loaded("chatml with generation tags")
    rows = [{"role": t.role, "content": t.content} for t in CONVERSATION]
    theirs = marked.tokenizer.apply_chat_template(
        rows, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    ours = row(marked, CONVERSATION)
    assert ours.input_ids == theirs["input_ids"]
    assert [label != IGNORE for label in ours.labels] == [bool(m) for m in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "trap", ["<|im_start|>assistant\nfake<|im_end|>", "[/INST] fake", "### Response:\nfake", "### Instruction:\nfake"]
)
def test_text_that_holds_the_marker_itself_does_not_move_the_mask(name: str, trap: str) -> None:
    template = loaded(name)
    turns = (
        Turn("user", trap),
        Turn("assistant", f"before {trap} after"),
        Turn("user", trap),
        Turn("assistant", "end"),
    )
    first, second = trained_texts(template, row(template, turns))
    closing = template.closing
    assert first.removesuffix(closing).strip() == f"before {trap} after"
    assert second.removesuffix(closing).strip() == "end"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_empty_response_trains_its_end_only(name: str) -> None:
    template = loaded(name)
    turns = (Turn("user", "a"), Turn("assistant", ""), Turn("user", "b"), Turn("assistant", "c"))
    empty, full = trained_texts(template, row(template, turns))
    eos = template.tokenizer.eos_token
    assert empty.strip() == eos
    assert full.replace(eos, "").strip() == "c"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_truncation_cuts_ids_and_mask_alike(name: str) -> None:
    template = loaded(name)
    whole = row(template, CONVERSATION)
    assert not whole.truncated
    for length in range(1, len(whole.input_ids)):
        cut = row(template, CONVERSATION, max_length=length)
        assert cut.truncated
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
    assert row(template, CONVERSATION, max_length=3).trained == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_text_is_trained_whole_behind_the_first_token(name: str) -> None:
    template = loaded(name)
    tokens = row(template, (Turn("text", "The quick brown fox."),))
    assert tokens.labels[1:] == tokens.input_ids[1:]
    assert tokens.input_ids[-1] == template.tokenizer.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_the_training_row_begins_with(name: str) -> None:
    """Generation meets the very tokens that training stopped before."""
    template = loaded(name)
    tokens = row(template, CONVERSATION)
    prompt = template.tokenizer(template.prompt(CONVERSATION[:2]), add_special_tokens=False)["input_ids"]
    assert tokens.input_ids[: len(prompt)] == prompt
    assert set(tokens.labels[: len(prompt)]) == {IGNORE}
    assert tokens.labels[len(prompt)] != IGNORE


def test_a_response_that_would_merge_with_the_prompt_is_kept_apart() -> None:
    template = loaded("chatml")
    turns = (Turn("user", "a"), Turn("assistant", "\n\n\n  indented"))
    assert trained_texts(template, row(template, turns)) == ["\n\n\n  indented<|im_end|>"]


def test_own_templates_of_a_recipe_are_used() -> None:
    data = DataSection(dataset_name="x", instruction_template="Q: ", response_template="A: it's\\n ")
    template = loaded("OPT, no template", data)
    text = template.render((Turn("user", "why?"), Turn("assistant", "so"))).text
    assert text == "</s>Q: why?\n\nA: it's\\n so</s>"
    assert trained_texts(template, row(template, (Turn("user", "why?"), Turn("assistant", "so")))) == ["so</s>"]


def test_a_template_that_writes_no_stop_token_gets_one(tmp_path: Path) -> None:
    file = tmp_path / "bare.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    template = loaded("chatml", DataSection(dataset_name="x", chat_template_path=str(file)))
    tokens = row(template, CONVERSATION[1:])
    assert tokens.labels[-1] == template.tokenizer.eos_token_id
    assert stop_token_ids(template) == [template.tokenizer.eos_token_id]


def test_a_template_that_rewrites_old_responses_is_followed(tmp_path: Path) -> None:
    """In the manner of reasoning models: thoughts are dropped from all turns but the last."""
    file = tmp_path / "think.jinja"
    file.write_text(
        "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = loaded("chatml", DataSection(dataset_name="x", chat_template_path=str(file)))
    turns = (
        Turn("user", "a"),
        Turn("assistant", "<think>x</think>b"),
        Turn("user", "c"),
        Turn("assistant", "<think>y</think>d"),
    )
    assert trained_texts(template, row(template, turns)) == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]


def test_what_a_template_refuses_is_a_fault_of_the_record() -> None:
    template = loaded("llama-2 on byte-level BPE")
    with pytest.raises(Fault, match="roles must alternate"):
        template.render((Turn("assistant", "a"), Turn("assistant", "b")))


def test_a_broken_template_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("{% for m in messages %}")
    with pytest.raises(DataError, match=r"data\.chat_template_path: the chat template refuses it"):
        loaded("chatml", DataSection(dataset_name="x", chat_template_path=str(file)))
    with pytest.raises(DataError, match=r"give a readable Jinja file"):
        loaded("chatml", DataSection(dataset_name="x", chat_template_path=str(tmp_path / "none.jinja")))


def test_trimmed_offsets_still_cover_white_space() -> None:
    assert covered([(0, 3), (4, 7), (8, 8), (9, 9)]) == [(0, 3), (3, 7), (7, 8), (8, 9)]
    assert covered([(0, 1), (0, 1), (1, 2)]) == [(0, 1), (0, 1), (1, 2)]


def test_the_mask_of_ranges() -> None:
    assert mask([(0, 2), (2, 4), (4, 6), (6, 8)], [(2, 3), (6, 8)]) == [False, True, False, True]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
markers = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "### Response:\n", "\n\n", " ", "</s>"])
contents = st.lists(words | markers, min_size=1, max_size=4).map("".join).filter(str.strip)
dialogues = st.lists(st.tuples(contents, contents | st.just("")), min_size=1, max_size=3)
_PREPARED = {name: loaded(name) for name in ("chatml", "chatml with generation tags", "OPT, no template")}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(_PREPARED)), dialogues, st.none() | contents)
def test_trained_tokens_decode_to_exactly_the_assistants_texts(
    name: str, pairs: list[tuple[str, str]], system: str | None
) -> None:
    template = _PREPARED[name]
    turns = [Turn("system", system)] if system else []
    for question, response in pairs:
        turns += [Turn("user", question), Turn("assistant", response)]
    tokens = row(template, tuple(turns))
    trained = [label for label in tokens.labels if label != IGNORE]
    expected = "".join(response + template.closing for _, response in pairs)
    assert template.tokenizer.decode(trained, clean_up_tokenization_spaces=False) == expected
    assert (
        template.tokenizer.decode(tokens.input_ids, clean_up_tokenization_spaces=False)
        == template.render(tuple(turns)).text
    )
