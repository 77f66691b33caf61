"""Answers: the same in a batch as alone, cut to fit the model, ended where a response ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_dist.config import DataSection, EvalSection
from sft_dist.data.formats import Turn
from sft_dist.data.template import ChatTemplate, load_template
from sft_dist.evaluation.generation import answer, generating, prompts_of
from tests import tiny

PROMPTS = [(Turn("user", text),) for text in ("a", "the quick brown fox jumps over the lazy dog", "def add(a, b):")]
SETTINGS = EvalSection(max_new_tokens=12)


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tiny.save_model(tmp_path_factory.mktemp("model"), request.param, seed=5)
    return AutoModelForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]


@pytest.fixture
def template(model: PreTrainedModel) -> ChatTemplate:
    tokenizer = tiny.opt_tokenizer() if model.config.model_type == "opt" else tiny.chat_tokenizer()
    return load_template(tokenizer, DataSection(dataset_name="x"))


def test_a_batch_gives_each_prompt_the_answer_that_it_gets_alone(
    model: PreTrainedModel, template: ChatTemplate
) -> None:
    together = answer(model, template, PROMPTS, SETTINGS, 512)
    alone = [answer(model, template, [prompt], SETTINGS, 512)[0] for prompt in PROMPTS]
    assert together == alone


def test_an_answer_is_what_the_model_finds_most_likely(model: PreTrainedModel, template: ChatTemplate) -> None:
    """Token by token, without a cache or a batch."""
    ids = template.tokenizer(template.prompt(PROMPTS[1]), add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(SETTINGS.max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == template.tokenizer.eos_token_id:
            break
    expected = template.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert answer(model, template, [PROMPTS[1]], SETTINGS, 512) == [expected]


def test_a_prompt_beyond_the_model_is_cut_on_the_left(model: PreTrainedModel, template: ChatTemplate) -> None:
    long = (Turn("user", "word " * 2000),)
    assert len(answer(model, template, [long], SETTINGS, 64)) == 1


def test_settings_of_training_come_back(model: PreTrainedModel) -> None:
    model.train()
    model.config.use_cache = False
    with generating(model):
        assert not model.training
        assert model.config.use_cache
    assert model.training
    assert not model.config.use_cache
    model.eval()


def test_the_first_question_of_each_row_is_asked() -> None:
    rows = [
        {"turns": '[["system", "s"], ["user", "q1"], ["assistant", "a1"], ["user", "q2"], ["assistant", "a2"]]'},
        {"turns": '[["text", "plain"]]'},
        {"turns": '[["user", "q3"], ["assistant", "a3"]]'},
    ]
    found = prompts_of(rows, 5)
    assert [(prompt[-1].content, reference) for prompt, reference in found] == [("q1", "a1"), ("q3", "a3")]
    assert prompts_of(rows, 1) == found[:1]
