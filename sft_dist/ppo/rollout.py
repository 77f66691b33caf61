"""A rollout: responses to prompts, what the models say of them, and what the updates are made from.

It is the same on all ranks: each makes its share of the responses, and all are given all of them. So what is computed
over a rollout depends on no number of processes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from sft_dist.config_stages import PPOSection
from sft_dist.ppo.formulas import (
    AdaptiveKL,
    Moments,
    advantages_of,
    beyond_target,
    kl_of_tokens,
    masked_mean,
    scored,
    whitened,
)
from sft_dist.ppo.sampling import Ids

Tensor = torch.Tensor


@dataclass
class Response:
    """One response and what the models say of its tokens: log-probabilities, values and entropies, (tokens,) each."""

    place: int
    ids: Ids
    ended: bool
    log_probs: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    score: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Rollout:
    """Prompts and responses, the first in the order of the recipe's data. `rows`: of the prompts among the data.

    Tensors over tokens are (responses, longest response), zero behind the end; `score` and `ended` are (responses,).
    `score` is the weighted sum of the rewards, of which `parts` has each. `advantages` and `returns` are what the
    updates are made from.
    """

    number: int
    rows: list[int]
    prompts: list[Ids]
    responses: list[Ids]
    parts: dict[str, list[float]]
    ended: Tensor
    score: Tensor
    log_probs: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, (responses,)."""
        return torch.tensor([len(response) for response in self.responses])

    @property
    def mask(self) -> Tensor:
        """Where there are tokens, (responses, longest response)."""
        return torch.arange(self.log_probs.shape[1]) < self.lengths.unsqueeze(1)


def put_together(number: int, rows: list[int], prompts: list[Ids], responses: Sequence[Response]) -> Rollout:
    """A rollout of the responses to its prompts, in any order."""
    ordered = sorted(responses, key=lambda one: one.place)
    width = max(1, *(len(one.ids) for one in ordered))

    def padded(name: str) -> Tensor:
        found = torch.zeros(len(ordered), width)
        for row, one in enumerate(ordered):
            found[row, : len(one.ids)] = getattr(one, name)
        return found

    return Rollout(
        number=number,
        rows=rows,
        prompts=prompts,
        responses=[one.ids for one in ordered],
        parts={name: [one.parts[name] for one in ordered] for name in ordered[0].parts},
        ended=torch.tensor([one.ended for one in ordered]),
        score=torch.tensor([one.score for one in ordered], dtype=torch.float64),
        log_probs=padded("log_probs"),
        reference=padded("reference"),
        values=padded("values"),
        entropy=padded("entropy"),
    )


def settle(rollout: Rollout, settings: PPOSection, kl: AdaptiveKL, moments: Moments) -> dict[str, float]:
    """Compute advantages and returns in float64, and bring the penalty and the moments up to date.

    Returns what is logged of the rollout, under the names that TRL's trainer had.
    """
    mask, coefficient = rollout.mask, kl.coefficient
    scores = rollout.score
    if settings.reward_norm:
        moments.add(scores)
        scores = moments.normalised(scores)
    if settings.reward_clip is not None:
        scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
    if settings.missing_eos_penalty is not None:
        scores = torch.where(rollout.ended, scores, scores - settings.missing_eos_penalty)
    scores = scores - beyond_target(rollout.lengths, settings.length_target, settings.length_penalty)
    log_probs, reference = rollout.log_probs.double(), rollout.reference.double()
    divergence = kl_of_tokens(log_probs, reference, settings.kl_estimator)
    rewards = scored(scores, divergence, mask, coefficient)
    if settings.whiten_rewards:
        rewards = whitened(rewards, mask, shift_mean=False)
    advantages, returns = advantages_of(rewards, rollout.values.double(), mask, settings.gamma, settings.lam)
    if settings.whiten_advantages:
        advantages = whitened(advantages, mask)
    rollout.advantages, rollout.returns = advantages.float(), returns.float()
    told = statistics_of(rollout)
    penalty = float(torch.where(mask, divergence, 0.0).sum(1).mean()) * coefficient
    told |= {"objective/kl_coef": coefficient, "objective/non_score_reward": -penalty,
             "objective/rlhf_reward": float(scores.mean()) - penalty}  # fmt: skip
    kl.update(told["objective/kl"], len(rollout.responses))
    return told


def statistics_of(rollout: Rollout) -> dict[str, float]:
    """Means over the responses: score, KL to the reference in nats (k1), entropy of a token, length, repetition."""
    mask = rollout.mask
    kl = torch.where(mask, rollout.log_probs.double() - rollout.reference.double(), 0.0).sum(1)
    found = {
        "objective/scores": float(rollout.score.mean()),
        "objective/kl": float(kl.mean()),
        "objective/entropy": float(masked_mean(rollout.entropy.double(), mask)),
        "completions/mean_length": float(rollout.lengths.double().mean()),
        "completions/repetition": sum(map(repetition, rollout.responses)) / len(rollout.responses),
        "completions/ended": float(rollout.ended.double().mean()),
    }
    if len(rollout.parts) > 1:
        found |= {f"rewards/{name}": sum(given) / len(given) for name, given in rollout.parts.items()}
    return found


def repetition(response: Ids, size: int = 4) -> float:
    """The share of a response's runs of `size` tokens that were there before in it."""
    runs = [tuple(response[start : start + size]) for start in range(len(response) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def samples_of(
    rollout: Rollout, count: int, decode: Callable[[Ids], str], where: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The first so many responses for people, with their rewards."""
    kl = torch.where(rollout.mask, rollout.log_probs - rollout.reference, 0.0).sum(1)
    return [
        {
            "rollout": rollout.number,
            "where": where(rollout.rows[row]),
            "prompt": decode(rollout.prompts[row]),
            "response": decode(rollout.responses[row]),
            "score": float(rollout.score[row]),
            "rewards": {name: given[row] for name, given in rollout.parts.items()},
            "kl": float(kl[row]),
            "tokens": len(rollout.responses[row]),
            "ended": bool(rollout.ended[row]),
        }
        for row in range(min(count, len(rollout.responses)))
    ]


def to_document(rollout: Rollout) -> str:
    """A rollout as a checkpoint keeps it, to the bit."""
    held: dict[str, Any] = {}
    for one in fields(rollout):
        value = getattr(rollout, one.name)
        if isinstance(value, Tensor):
            array = value.numpy()
            value = {
                "type": str(array.dtype),
                "shape": array.shape,
                "bytes": base64.b64encode(array.tobytes()).decode(),
            }
        held[one.name] = value
    return json.dumps(held)


def from_document(text: str) -> Rollout:
    """The reverse of :func:`to_document`."""
    return Rollout(**{name: _tensor(value) for name, value in json.loads(text).items()})


def _tensor(value: Any) -> Any:
    if not (isinstance(value, Mapping) and "bytes" in value):
        return value
    flat = np.frombuffer(base64.b64decode(value["bytes"]), value["type"])
    return torch.from_numpy(flat.reshape(value["shape"]).copy())
