"""Where rewards come from: reward models and functions of the user's, several of them summed by their weights."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.config_stages import PPOSection
from sft_dist.errors import UserError
from sft_dist.ppo.names import RewardName, reward_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Callable[..., Any]


@dataclass(frozen=True)
class Texts:
    """Responses as text and as tokens, each with its prompt. `wheres`: how people find the prompts' records."""

    prompts: list[str]
    completions: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    wheres: list[str]


@dataclass(frozen=True)
class ModelReward:
    """A reward model, by its number among those of the actors. `tokenizer`: its own, None where it is the policy's."""

    name: RewardName
    number: int
    tokenizer: PreTrainedTokenizerBase | None
    pad: int
    limit: int | None

    def rows(self, texts: Texts) -> list[list[int]]:
        """The tokens that the model is given of each response."""
        if self.tokenizer is None:
            rows = [[*a, *b] for a, b in zip(texts.prompt_ids, texts.completion_ids, strict=True)]
        else:
            pairs = zip(texts.prompts, texts.completions, strict=True)
            rows = [self.tokenizer(a + b, add_special_tokens=False)["input_ids"] for a, b in pairs]
        return [row if self.limit is None else row[-self.limit :] for row in rows]

    def __call__(self, texts: Texts, model: Callable[..., torch.Tensor], device: Any) -> list[float]:
        """The rewards. `model`: calls the actors."""
        rows = self.rows(texts)
        ids = torch.full((len(rows), max(map(len, rows))), self.pad)
        attention = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            attention[number, : len(row)] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
        found: list[float] = model("reward", number=self.number, **inputs).tolist()
        return found


@dataclass(frozen=True)
class FunctionReward:
    """A Python function."""

    name: RewardName
    function: Function

    def __call__(self, texts: Texts) -> list[float]:
        """The rewards. Raises :class:`UserError`, with the first sample, for what is no reward."""
        key, path = self.name.key, self.name.source
        try:
            given = self.function(prompts=list(texts.prompts), completions=list(texts.completions))
        except Exception as error:
            raise UserError(
                f"{key}: {path} raised {type(error).__name__}: {error} (first of {_sample(texts, 0)})"
            ) from error
        try:
            rewards = list(given)
        except TypeError as error:
            raise UserError(f"{key}: {path} gave a {type(given).__name__}; it must give a list of numbers") from error
        if len(rewards) != len(texts.completions):
            raise UserError(
                f"{key}: {path} gave {len(rewards)} rewards for {len(texts.completions)} completions "
                f"(first of {_sample(texts, 0)}); it must give one for each"
            )
        for number, reward in enumerate(rewards):
            if not isinstance(reward, numbers.Real | torch.Tensor) or not math.isfinite(float(reward)):
                raise UserError(
                    f"{key}: {path} gave {reward!r} for {_sample(texts, number)}; it must give finite numbers"
                )
        return [float(reward) for reward in rewards]


def _sample(texts: Texts, number: int) -> str:
    return f"the response {texts.completions[number][:80]!r} to {texts.wheres[number]}"


def functions_of(settings: PPOSection) -> list[FunctionReward]:
    """The functions of a recipe. Raises :class:`UserError` where one cannot be imported."""
    return [FunctionReward(name, load_function(name)) for name in reward_names(settings) if name.is_function]


def load_function(name: RewardName) -> Function:
    """The function behind `package.module:function`. Raises :class:`UserError`."""
    module, _, attribute = name.source.partition(":")
    try:
        function: Function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{name.key}: {name.source}: {error}; it must be package.module:function, importable from here"
        ) from error
    if not callable(function):
        raise UserError(f"{name.key}: {name.source} is a {type(function).__name__}, not a function")
    return function


def tokenizer_fault(own: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase) -> str | None:
    """How a reward model's tokenizer differs from the policy's, or None where both give the same tokens."""
    if own.get_vocab() != policys.get_vocab():
        return f"its vocabulary has {len(own):,} tokens, the policy's {len(policys):,}, and they are not the same"
    probe = "def f(x):\n    return  x + 1  # é, 3.14\n\n"
    if own(probe)["input_ids"] != policys(probe)["input_ids"]:
        return "its tokenizer cuts the same text into other tokens than the policy's"
    return None


def weighted(scores: Sequence[Sequence[float]], names: Sequence[RewardName]) -> list[float]:
    """The sum of several rewards of each response by their weights."""
    pairs = [zip(part, [name.weight] * len(part), strict=True) for part, name in zip(scores, names, strict=True)]
    return [sum(score * weight for score, weight in one) for one in zip(*pairs, strict=True)]
