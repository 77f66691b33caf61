"""Which strategy `parallel.strategy=auto` stands for: the least sharding whose model states fit into the GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import hub
from launch.devices import Gpu
from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.modelinfo import count_parameters
from sft_dist.ppo.names import reward_names

# What activations, buffers and fragments are left; the rest is for weights, gradients and optimizer states.
_SHARE_OF_STATES = 0.7
_LADDER = ("ddp", "zero2", "fsdp2", "zero3_offload")


def config_of(recipe: Recipe) -> Mapping[str, Any] | None:
    """The configuration of the recipe's model, or None where it cannot be known from here."""
    name = recipe.model.model_name_or_path
    if builtin_models.is_built_in(name):
        return builtin_models.CONFIG
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return hub.local_config(path, recipe.model, "model.model_name_or_path")
        if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            # What another run is yet to write there.
            return None
        return hub.model_config(name, recipe.model.model_revision).config
    except UserError:
        return None


def strategy_for(recipe: Recipe, processes: int, gpus: Sequence[Gpu]) -> str:
    """What `auto` stands for on several processes. Without a GPU nothing has to fit, and the model is not looked at."""
    return fitting(recipe, config_of(recipe) if gpus else None, processes, gpus)


def fitting(recipe: Recipe, config: Mapping[str, Any] | None, processes: int, gpus: Sequence[Gpu]) -> str:
    """The first strategy of the ladder that fits on several processes; `ddp` where memory or size is not known."""
    weights = count_parameters(config) if config is not None else None
    memory = min((gpu.memory_bytes for gpu in gpus), default=0)
    if not weights or not memory:
        return _LADDER[0]
    room = memory * _SHARE_OF_STATES
    return next((one for one in _LADDER if state_bytes(recipe, weights, one, processes) <= room), _LADDER[-1])


def models_of(recipe: Recipe) -> tuple[int, int]:
    """How many models of the recipe's size a stage trains, and how many it holds.

    Of a LoRA run the reference, and the value of PPO, are the model itself; a reward model is taken to be as large.
    """
    lora = recipe.peft.use_peft
    if recipe.stage == "dpo":
        return 1, 1 if lora or recipe.dpo.precompute_ref_log_probs else 2
    if recipe.stage == "ppo":
        rewards = sum(not name.is_function for name in reward_names(recipe.ppo))
        trained = 1 if lora or recipe.ppo.value_model == "shared" else 2
        return trained, trained + (0 if lora else 1) + rewards
    return 1, 1


def state_bytes(recipe: Recipe, weights: int, strategy: str, processes: int) -> float:
    """Bytes of weights, gradients and optimizer states on each device, of all models that the stage has.

    Of a weight that is trained: itself and its gradient in `model.dtype`, and Adam's two moments in fp32. What is
    sharded counts by 1/N (Rajbhandari et al. 2020, ZeRO, section 3). Under LoRA the weights alone: the adapter is
    small beside them.
    """
    one = 4.0 if recipe.model.dtype == "float32" else 2.0
    trained_models, all_models = models_of(recipe)
    if recipe.peft.use_peft:
        trained, held = 0.0, (0.6 if recipe.peft.load_in_4bit else one) * all_models
    else:
        trained, held = (one + 8.0) * trained_models, one * all_models
    sharded_states = strategy != "ddp"
    sharded_weights = strategy in ("fsdp2", "zero3_offload")
    if strategy == "zero3_offload":
        # Weights and moments lie in the memory of the processor, gradients pass through the device.
        return weights * one * all_models / processes
    return weights * (held / (processes if sharded_weights else 1) + trained / (processes if sharded_states else 1))
