"""Several models on the same held-out prompts, scored by one reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.data.formats import Conversation
from sft_dist.data.template import ChatTemplate, stop_token_ids
from sft_dist.evaluation.generation import generating
from sft_dist.evaluation.perplexity import measure_rows
from sft_dist.ppo.sampling import chances, respond
from sft_dist.render.contest import Contender, Sample
from sft_dist.reward_model import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = list[int]
_BATCH = 16


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn. `temperature` 0 is greedy; the same `seed` draws the same."""

    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Responses:
    """Of one model to all prompts: the tokens of each prompt, and those of the response with what ended it."""

    prompts: list[Ids]
    responses: list[Ids]


@dataclass(frozen=True)
class Judge:
    """A reward model and its template."""

    model: RewardModel
    template: ChatTemplate

    def rewards(self, prompts: Sequence[Conversation], texts: Sequence[str]) -> list[float]:
        """The reward of each text as the whole answer to its prompt.

        Each is closed as an answer is, also one that was cut at its limit: that is how the model has learned of
        answers that break off.
        """
        tokenizer, closing = self.template.tokenizer, self.template.closing
        end = [tokenizer.eos_token_id] if self.template.append_eos else []
        whole = [self.template.prompt(turns) + text + closing for turns, text in zip(prompts, texts, strict=True)]
        rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], *end] for text in whole]
        limit = self.model.limit
        return self.model.rewards([row if limit is None else row[-limit:] for row in rows], _BATCH)


def drawn(
    model: PreTrainedModel, template: ChatTemplate, prompts: Sequence[Conversation], drawing: Drawing, limit: int
) -> Responses:  # fmt: skip
    """One response a prompt. `limit`: positions that the model has; a prompt is cut on the left to leave room."""
    tokenizer, stops = template.tokenizer, stop_token_ids(template)
    room = max(limit - drawing.max_new_tokens, 1)
    ids = [tokenizer(template.prompt(turns), add_special_tokens=False)["input_ids"][-room:] for turns in prompts]
    # What is drawn depends on the place of a prompt, not on those that share its batch.
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: dict[int, Ids] = {}
    with generating(model):
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            numbers = chances(drawing.seed, 0, places, drawing.max_new_tokens) if drawing.temperature else None
            answers = respond(
                model, [ids[place] for place in places], numbers, drawing.max_new_tokens, drawing.temperature or 1.0,
                stops, tokenizer.pad_token_id, lambda: None,
            )  # fmt: skip
            found |= zip(places, answers, strict=True)
    return Responses(ids, [found[place] for place in range(len(ids))])


@torch.no_grad()
def kl_per_response(
    policy: PreTrainedModel, reference: PreTrainedModel, drawn: Responses, temperature: float
) -> list[float]:  # fmt: skip
    """KL(policy || reference) summed over the tokens of each response, in nats.

    At each position the whole distributions are compared, not only the token that was drawn: the mean over drawn
    responses is the KL of the two models' responses, with less variance than log-ratios have. `temperature` is that
    of both; for greedy responses, 1.
    """
    found = []
    for prompt, response in zip(drawn.prompts, drawn.responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=policy.device)
        logs = [_log_probabilities(model, ids, len(response), temperature) for model in (policy, reference)]
        found.append(float((logs[0].exp() * (logs[0] - logs[1])).sum()))
    return found


def _log_probabilities(model: Any, ids: torch.Tensor, tokens: int, temperature: float) -> torch.Tensor:
    """Of the last `tokens` positions, each a distribution over the vocabulary, in float32."""
    out = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=tokens + 1)
    logs: torch.Tensor = torch.log_softmax(out.logits[0, :-1].float() / temperature, dim=-1)
    return logs.to(ids.device)


def contender(
    name: str, path: str, model: PreTrainedModel, reference: PreTrainedModel | None, template: ChatTemplate,
    prompts: Sequence[Conversation], rows: Any, judge: Judge, drawing: Drawing, limit: int,
) -> Contender:  # fmt: skip
    """A model's responses with their rewards, its perplexity on prepared `rows`, and its KL from the `reference`."""
    model.eval()
    found = drawn(model, template, prompts, drawing, limit)
    texts = [template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found.responses]
    rewards = judge.rewards(prompts, texts)
    kl: Sequence[float | None] = [None] * len(prompts)
    if reference is not None:
        kl = kl_per_response(model, reference, found, drawing.temperature or 1.0)
    stops = stop_token_ids(template)
    samples = [
        Sample(text, reward, len(ids), bool(ids) and ids[-1] in stops, distance)
        for text, reward, ids, distance in zip(texts, rewards, found.responses, kl, strict=True)
    ]
    measure = measure_rows(model, rows, template.tokenizer.pad_token_id, _BATCH, model.device)
    return Contender(name, path, measure, tuple(samples))
