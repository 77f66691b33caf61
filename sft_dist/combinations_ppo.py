"""Rules on the settings of PPO (see `combinations`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft_dist.config import Recipe
from sft_dist.config_stages import PPOSection
from sft_dist.ppo.names import FUNCTION
from sft_dist.rules import Finding, rule


def _is_set(recipe: Recipe, key: str) -> bool:
    return bool(getattr(recipe.ppo, key) != PPOSection.model_fields[key].default)


@rule("stage", "ppo.reward", "ppo.rewards")
def _some_reward(recipe: Recipe) -> Iterator[Finding]:
    settings = recipe.ppo
    if recipe.stage != "ppo":
        return
    if settings.reward is None and not settings.rewards:
        yield "ppo.reward", "is missing: name a reward model, or a function as package.module:function"
    if settings.reward is not None and settings.rewards is not None:
        yield "ppo.rewards", "cannot stand with ppo.reward, which is the only one then; keep one of the two"


@rule("ppo.reward", "ppo.rewards")
def _rewards_are_named(recipe: Recipe) -> Iterator[Finding]:
    settings = recipe.ppo
    if settings.reward is not None and ":" in settings.reward and not FUNCTION.fullmatch(settings.reward):
        yield "ppo.reward", f"{settings.reward} is neither a model nor package.module:function"
    for name, source in (settings.rewards or {}).items():
        key = f"ppo.rewards.{name}"
        if (source.model is None) == (source.function is None):
            yield key, "names a model or a function, one of the two"
        elif source.function is not None and not FUNCTION.fullmatch(source.function):
            yield f"{key}.function", f"{source.function} is not package.module:function"
        if source.weight == 0:
            yield f"{key}.weight", "0 leaves the reward out; give another weight, or take the reward away"


@rule("stage", "ppo.response_length", "train.max_length")
def _room_for_a_prompt(recipe: Recipe) -> Iterator[Finding]:
    longest, response = recipe.train.max_length, recipe.ppo.response_length
    if recipe.stage == "ppo" and longest is not None and response >= longest:
        yield (
            "ppo.response_length",
            f"{response} tokens leave no room for a prompt in rows of {longest} (train.max_length); lower it",
        )


@rule(
    "stage", "ppo.rollout_batch_size", "ppo.num_mini_batches", "ppo.num_ppo_epochs", "train.max_steps",
    "parallel.global_batch_size", "parallel.processes", "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
)  # fmt: skip
def _rollouts_divide(recipe: Recipe) -> Iterator[Finding]:
    rows = recipe.parallel.global_batch_size
    if rows is None and recipe.parallel.processes is not None:
        train = recipe.train
        rows = recipe.parallel.processes * train.per_device_train_batch_size * train.gradient_accumulation_steps
    rollout, wanted, epochs = recipe.ppo.rollout_batch_size, recipe.ppo.num_mini_batches, recipe.ppo.num_ppo_epochs
    if recipe.stage != "ppo":
        return
    if rows is not None and rollout is not None and (rollout % rows or (wanted and rollout != rows * wanted)):
        count = wanted or math.ceil(rollout / rows)
        yield (
            "ppo.rollout_batch_size",
            (
                f"{rollout} prompts are not {f'{wanted} ' if wanted else 'whole '}mini-batches of {rows} responses "
                f"(parallel.global_batch_size); make it {rows * count}"
            ),
        )
        return
    mini_batches = wanted or (rollout // rows if rows and rollout else 1 if rollout is None else None)
    steps, each = recipe.train.max_steps, epochs * (mini_batches or 1)
    if mini_batches and steps > 0 and steps % each:
        yield (
            "train.max_steps",
            (
                f"{steps} is no whole number of rollouts, each of {each} steps (ppo.num_ppo_epochs={epochs}, "
                f"{mini_batches} mini-batch{'es' * (mini_batches > 1)}); take {math.ceil(steps / each) * each}"
            ),
        )


@rule("ppo.length_target", "ppo.length_penalty")
def _length_control(recipe: Recipe) -> Iterator[Finding]:
    if (recipe.ppo.length_target is None) != (recipe.ppo.length_penalty == 0):
        yield "ppo.length_penalty", "goes with ppo.length_target: set both or leave both out"


@rule("ppo.ptx_coef", "ppo.ptx_dataset_name", "ppo.ptx_dataset_train_split")
def _ptx_data(recipe: Recipe) -> Iterator[Finding]:
    if (recipe.ppo.ptx_dataset_name is None) != (recipe.ppo.ptx_coef == 0):
        yield "ppo.ptx_coef", "goes with ppo.ptx_dataset_name: set both or leave both out"
    elif recipe.ppo.ptx_dataset_name is None and _is_set(recipe, "ptx_dataset_train_split"):
        yield "ppo.ptx_dataset_train_split", "has no effect without ppo.ptx_dataset_name; leave it out"


@rule("ppo.kl_target", "ppo.kl_horizon", "ppo.kl_coef")
def _steered_kl(recipe: Recipe) -> Iterator[Finding]:
    if recipe.ppo.kl_target is None and _is_set(recipe, "kl_horizon"):
        yield "ppo.kl_horizon", "has no effect without ppo.kl_target; set that or leave this out"
    if recipe.ppo.kl_target is not None and recipe.ppo.kl_coef == 0:
        yield "ppo.kl_coef", "0 cannot be steered to ppo.kl_target; begin with a positive one"


@rule("ppo.max_kl", "ppo.on_max_kl")
def _bound_of_kl(recipe: Recipe) -> Iterator[Finding]:
    if recipe.ppo.max_kl is None and _is_set(recipe, "on_max_kl"):
        yield "ppo.on_max_kl", "has no effect without ppo.max_kl; set that or leave this out"


@rule("ppo.value_model", "ppo.value_model_name_or_path", "stage")
def _start_of_the_value(recipe: Recipe) -> Iterator[Finding]:
    if recipe.ppo.value_model == "shared" and recipe.ppo.value_model_name_or_path is not None:
        yield (
            "ppo.value_model_name_or_path",
            "has no effect with ppo.value_model=shared beyond its head; leave it out, or take separate",
        )


@rule("stage", "guard.spike_factor", "train.torch_compile", "ppo.generator", "peft.load_in_4bit")
def _what_ppo_has_not(recipe: Recipe) -> Iterator[Finding]:
    if recipe.stage != "ppo":
        return
    if recipe.guard.spike_factor is not None:
        yield (
            "guard.spike_factor",
            "a loss of PPO is near zero and of either sign, so that no multiple tells; leave it out",
        )
    if recipe.train.torch_compile:
        yield "train.torch_compile", "cannot stand with stage=ppo so far; leave it out"
    if recipe.ppo.generator == "vllm" and recipe.peft.load_in_4bit:
        yield "ppo.generator", "vllm is given whole weights, and peft.load_in_4bit leaves none; take transformers"
