"""Answers of a model to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.config import EvalSection
from sft_dist.data.formats import Conversation, Turn
from sft_dist.data.rows import turns_of
from sft_dist.data.template import ChatTemplate, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 8


def prompts_of(rows: Any, count: int) -> list[tuple[Conversation, str]]:
    """The first question of the first `count` rows that have one, each with its reference answer."""
    prompts: list[tuple[Conversation, str]] = []
    for row in rows:
        if len(prompts) >= count:
            break
        turns = turns_of(row)
        at = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), None)
        if at:
            prompts.append((turns[:at], turns[at].content))
    return prompts


def answer(
    model: PreTrainedModel,
    template: ChatTemplate,
    prompts: Sequence[Conversation],
    settings: EvalSection,
    limit: int,
    streamer: Any = None,
    together: bool = False,
) -> list[str]:
    """One answer a prompt, without special tokens; greedy unless `settings.temperature` is positive.

    `limit`: positions the model has; a prompt is cut on the left to leave room for the answer. `streamer`: one of
    transformers', which is told the tokens of a single prompt's answer as they come. `together`: all processes answer
    the same prompts, each pass of the model being one of all of them.
    """
    answers: dict[int, str] = {}
    texts = [template.prompt(turns) for turns in prompts]
    # Prompts of like length share a batch; the order of the answers is that of the prompts.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with generating(model):
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            found = _batch(model, template, [texts[i] for i in part], settings, limit, streamer, together)
            answers |= zip(part, found, strict=True)
    return [answers[i] for i in range(len(texts))]


def _batch(
    model: PreTrainedModel,
    template: ChatTemplate,
    texts: list[str],
    settings: EvalSection,
    limit: int,
    streamer: Any,
    together: bool,
) -> list[str]:
    tokenizer = template.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    room = max(limit - settings.max_new_tokens, 1)
    ids = [row[-room:] for row in ids]
    width = max(map(len, ids))
    inputs = torch.full((len(ids), width), tokenizer.pad_token_id)
    attention = torch.zeros_like(inputs)
    for number, row in enumerate(ids):
        inputs[number, width - len(row) :] = torch.tensor(row)
        attention[number, width - len(row) :] = 1
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature}
    out = model.generate(
        input_ids=inputs.to(model.device),
        attention_mask=attention.to(model.device),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stop_token_ids(template),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        # With sampling the answers of the processes differ in length; none stops before all are done.
        synced_gpus=together,
        **sampling,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in out]


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with the key/value cache on; training's settings come back afterwards."""
    training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.config.use_cache = cache
        model.train(training)


def as_messages(turns: Conversation) -> tuple[tuple[str, str], ...]:
    """Turns as (role, content) pairs."""
    return tuple((turn.role, turn.content) for turn in turns)


def from_messages(messages: Sequence[Sequence[str]]) -> Conversation:
    """The reverse of :func:`as_messages`."""
    return tuple(Turn(role, content) for role, content in messages)
