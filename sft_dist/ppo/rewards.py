"""Where rewards come from: reward models and functions of the user's, several of them summed by their weights."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.config_stages import PPOSection
from sft_dist.data.formats import Conversation, Turn
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.modelinfo import max_positions
from sft_dist.models import load_config
from sft_dist.ppo.lora import own_adapter
from sft_dist.ppo.names import RewardName, reward_names
from sft_dist.reward_model import refuse_headless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Callable[..., Any]


@dataclass(frozen=True)
class Texts:
    """Responses as text and as tokens, each with its prompt. `wheres`: how people find the prompts' records."""

    turns: list[Conversation]
    completions: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    wheres: list[str]

    @property
    def prompts(self) -> list[str]:
        """The last turn of each prompt."""
        return [turns[-1].content for turns in self.turns]


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
            rows = [self._anew(*one) for one in zip(texts.turns, texts.completions, strict=True)]
        return [row if self.limit is None else row[-self.limit :] for row in rows]

    def _anew(self, turns: Conversation, completion: str) -> list[int]:
        """By the model's own chat template, or else as a pair of texts, as its tokenizer joins them."""
        assert self.tokenizer is not None
        ids: list[int]
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(turns[-1].content, completion)["input_ids"]
            return ids
        messages = [{"role": turn.role, "content": turn.content} for turn in (*turns, Turn("assistant", completion))]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

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
            rewards = list(given) if isinstance(given, Iterable) else None
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{key}: {path} raised {type(error).__name__}: {said} (first of {_sample(texts, 0)})"
            ) from error
        if rewards is None:
            raise UserError(f"{key}: {path} gave a {type(given).__name__}; it must give a list of numbers")
        if len(rewards) != len(texts.completions):
            raise UserError(
                f"{key}: {path} gave {len(rewards)} rewards for {len(texts.completions)} completions "
                f"(first of {_sample(texts, 0)}); it must give one for each"
            )
        for number, reward in enumerate(rewards):
            if not _is_finite(reward):
                said = " ".join(repr(reward).split())
                raise UserError(f"{key}: {path} gave {said} for {_sample(texts, number)}; it must give finite numbers")
        return [float(reward) for reward in rewards]


def _is_finite(reward: object) -> bool:
    """Whether it is a finite number, or a tensor of one."""
    if isinstance(reward, torch.Tensor):
        return reward.numel() == 1 and bool(torch.isfinite(reward).all())
    return isinstance(reward, numbers.Real) and math.isfinite(float(reward))


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
    except Exception as error:
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        said = " ".join(str(error).split())
        raise UserError(
            f"{name.key}: {name.source}: {kind}{said}; it must be package.module:function, importable from here"
        ) from error
    if not callable(function):
        raise UserError(f"{name.key}: {name.source} is a {type(function).__name__}, not a function")
    return function


def model_rewards(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, path: str) -> list[ModelReward]:
    """The reward models of a recipe. `tokenizer` and `path`: of the policy.

    Raises :class:`UserError` where one cannot judge what the policy writes.
    """
    names = [name for name in reward_names(recipe.ppo) if not name.is_function]
    return [_model_reward(recipe, tokenizer, path, name, number) for number, name in enumerate(names)]


def _model_reward(
    recipe: Recipe, policys: PreTrainedTokenizerBase, policy: str, name: RewardName, number: int
) -> ModelReward:
    path = builtin_models.resolve(name.source)
    section = recipe.model.model_copy(update={"model_name_or_path": path})
    try:
        if own_adapter(recipe, name.source, policy) is None:
            refuse_headless(path, section)
        config = load_config(path, section).to_dict()
        tokenizer = load_tokenizer(path, section, lambda _: None)
    except UserError as error:
        raise UserError(f"{name.key}: {str(error).removeprefix('model.model_name_or_path: ')}") from error
    fault = tokenizer_fault(tokenizer, policys)
    if fault and not recipe.ppo.retokenize:
        raise UserError(f"{name.key}: {name.source}: {fault}; set ppo.retokenize=true to give it the text anew")
    return ModelReward(name, number, tokenizer if fault else None, tokenizer.pad_token_id, max_positions(config))


def refuse_other_value(recipe: Recipe, policys: PreTrainedTokenizerBase) -> None:
    """Raise :class:`UserError` where the value model of a recipe does not know the policy's tokens, which it reads."""
    key, path = "ppo.value_model_name_or_path", recipe.ppo.value_model_name_or_path
    if path is None:
        return
    section = recipe.model.model_copy(update={"model_name_or_path": builtin_models.resolve(path)})
    try:
        tokenizer = load_tokenizer(section.model_name_or_path, section, lambda _: None)
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('model.model_name_or_path: ')}") from error
    if fault := tokenizer_fault(tokenizer, policys):
        raise UserError(f"{key}: {path}: {fault}; take a model that reads the policy's tokens")


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
