"""Drawing responses: the same ones on any number of processes, in any batches.

What is drawn for a prompt depends on the seed, the number of the rollout, the prompt's place in it, and the model:
each token takes one number between 0 and 1, which picks it out of the cumulated distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft_dist.data.arrangement import generator

Ids = list[int]


def chances(seed: int, rollout: int, places: Sequence[int], tokens: int) -> torch.Tensor:
    """Numbers in [0, 1) for each token of the responses at these places of a rollout, (places, tokens), float64."""
    drawn = [generator(seed, 2, rollout, place).random(tokens) for place in places]
    return torch.from_numpy(np.stack(drawn))


class PickedByChance(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each distribution the one token that its number picks. `width`: of the prompts, in tokens.

    The probabilities are cumulated in float64: in float32 the sum over a vocabulary is short by more than the
    probability of most of its tokens.
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, width: int) -> None:
        self.numbers, self.temperature, self.width = numbers, temperature, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sums = (scores.float() / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = self.numbers[:, input_ids.shape[1] - self.width].to(sums.device) * sums[:, -1]
        picked = torch.searchsorted(sums, drawn.unsqueeze(1), right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)


def respond(
    model: Any, prompts: Sequence[Ids], numbers: torch.Tensor | None, tokens: int, temperature: float,
    stops: Sequence[int], pad: int, alive: Callable[[], None],
) -> list[Ids]:  # fmt: skip
    """One response a prompt, with the token that ended it where one did.

    `numbers`: see `chances`; None is greedy. `stops`: tokens that end a response. `alive` is called at every token.
    """
    width = max(map(len, prompts))
    inputs = torch.full((len(prompts), width), pad)
    attention = torch.zeros_like(inputs)
    for row, ids in enumerate(prompts):
        inputs[row, width - len(ids) :] = torch.tensor(ids)
        attention[row, width - len(ids) :] = 1
    pick = [] if numbers is None else [PickedByChance(numbers, temperature, width)]
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=pad, use_cache=True
    )
    with _no_settings_of_its_own(model):
        out = model.generate(
            input_ids=inputs.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([*pick, _Alive(alive)]),
        )
    return [up_to_stop(row, stops) for row in out[:, width:].tolist()]


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """A model's settings for chat would bend the distribution that is trained: what a call leaves open they fill in."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, bare.generation_config = bare.generation_config, GenerationConfig()
    try:
        yield
    finally:
        bare.generation_config = before


class _Alive(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, alive: Callable[[], None]) -> None:
        self.alive = alive

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.alive()
        return scores


def up_to_stop(ids: Ids, stops: Sequence[int]) -> Ids:
    """A response up to and with the first token that ends it."""
    end = next((number for number, token in enumerate(ids) if token in stops), None)
    return ids if end is None else ids[: end + 1]
