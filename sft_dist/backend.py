"""What spreads the work over processes, as the launcher asks for it, and what the recipe fills in.

accelerate's launcher, and `sft-dist run` in its place, tell a worker the strategy in environment variables. All that
depends on the recipe or on the machine is added here, so that no value stands in two places. Free of torch: `check`
asks too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft_dist.config import Recipe
from sft_dist.errors import UserError

Kind = Literal["plain", "deepspeed", "fsdp2"]
_KEY = "parallel.strategy"
_DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"
# A name that ds_configs/zero3_hpz.yaml gives, of which accelerate passes on that it is there.
HIERARCHICAL = "zero_hpz_partition_size"


@dataclass(frozen=True)
class Backend:
    """How model states are spread. `stage`: of ZeRO; `node_shards`: weights are sharded within each node only.

    `offload_optimizer`, `offload_weights`: what is kept in the memory of the processor (or on a disk). `own`: further
    settings, of a DeepSpeed file of the user's.
    """

    kind: Kind = "plain"
    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    node_shards: bool = False
    own: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Backend:
        """The one that a launcher asks for. Raises :class:`UserError` for what this project does not do."""
        if _true(environment, "ACCELERATE_USE_FSDP"):
            if environment.get("FSDP_VERSION") != "2":
                raise UserError("fsdp_config.fsdp_version: FSDP1 is deprecated; set it to 2 in the Accelerate file")
            return cls("fsdp2", node_shards=environment.get("FSDP_SHARDING_STRATEGY") == "HYBRID_SHARD")
        if not _true(environment, "ACCELERATE_USE_DEEPSPEED"):
            return cls()
        every = own_settings(environment)
        own = every.get("zero_optimization", {})
        device = {
            what: own.get(f"offload_{what}", {}).get("device")
            or environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
            for what in ("optimizer", "param")
        }
        return cls(
            "deepspeed",
            stage=int(own.get("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))),
            offload_optimizer=device["optimizer"] != "none",
            offload_weights=device["param"] != "none",
            node_shards=HIERARCHICAL in environment.get(_FIELDS, "").split(",") or HIERARCHICAL in own,
            own=every,
        )

    @property
    def name(self) -> str:
        """The strategy of this name; for a mixture of settings that has no name, its parts."""
        named = next((name for name, backend in STRATEGIES.items() if backend == self), None)
        return named or f"ZeRO-{self.stage} with settings of its own"

    @property
    def title(self) -> str:
        """The name for people."""
        if self.kind == "plain":
            return "DDP"
        if self.kind == "fsdp2":
            return "FSDP2, sharded within nodes," if self.node_shards else "FSDP2"
        parts = [f"ZeRO-{self.stage}"] + ["sharded within nodes"] * self.node_shards
        offloaded = ["optimizer"] * self.offload_optimizer + ["weights"] * self.offload_weights
        parts += [f"{' and '.join(offloaded)} offloaded"] if offloaded else []
        return parts[0] if len(parts) == 1 else ", ".join(parts) + ","

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all weights."""
        return self.kind == "fsdp2" or self.stage == 3


STRATEGIES: dict[str, Backend] = {
    "ddp": Backend(),
    "zero1": Backend("deepspeed", 1),
    "zero2": Backend("deepspeed", 2),
    "zero2_offload": Backend("deepspeed", 2, offload_optimizer=True),
    "zero3": Backend("deepspeed", 3),
    "zero3_offload": Backend("deepspeed", 3, offload_optimizer=True, offload_weights=True),
    "zero3_hpz": Backend("deepspeed", 3, node_shards=True),
    "fsdp2": Backend("fsdp2"),
    "fsdp2_hybrid": Backend("fsdp2", node_shards=True),
}
# They need a node of several processes; the others work on one, and shard nothing.
NODE_SHARDS = tuple(name for name, backend in STRATEGIES.items() if backend.node_shards)


def _true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() == "true"


def own_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """The DeepSpeed file of the user's own that the launcher was given, or nothing. Raises :class:`UserError`."""
    path = environment.get(_DEEPSPEED_FILE, "none")
    if path == "none":
        return {}
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file: {path} cannot be read: {error}; mend it, or leave it out") from error
    if not isinstance(read, dict):
        raise UserError(f"deepspeed_config_file: {path} holds no JSON object; mend it, or leave it out")
    return read


def settle(recipe: Recipe, environment: MutableMapping[str, str] = os.environ) -> Backend:
    """The backend of this worker, in accord with the recipe. Raises :class:`UserError` where the two contradict.

    Variables that would give accelerate a second say are taken out of the environment.
    """
    backend = Backend.from_environment(environment)
    refuse_contradictions(recipe, backend, environment)
    if backend.kind == "deepspeed":
        # accelerate refuses a configuration that is passed to it beside these.
        environment.pop(_FIELDS, None)
        environment.pop(_DEEPSPEED_FILE, None)
    return backend


def refuse_contradictions(recipe: Recipe, backend: Backend, environment: Mapping[str, str]) -> None:
    """Raise :class:`UserError` where the launcher's settings say something else than the recipe does."""
    wanted = recipe.parallel.strategy
    if wanted not in ("auto", "single") and STRATEGIES[wanted] != backend:
        raise UserError(
            f"{_KEY}: the recipe says {wanted}, the launcher's file makes it {backend.name}; launch with "
            f"ds_configs/{wanted}.yaml as it came, or set {_KEY}=auto"
        )
    if wanted == "single" and (backend.kind != "plain" or int(environment.get("WORLD_SIZE", "1")) > 1):
        raise UserError(
            f"{_KEY}: the recipe says single, the launcher started more than that; launch with "
            f"ds_configs/single.yaml, or set {_KEY}=auto"
        )
    for where, said, key, value in _told_twice(recipe, backend, environment):
        raise UserError(
            f"{where}: {said} contradicts {key}={value} of the recipe; leave it out, it follows from the recipe"
        )


def _told_twice(
    recipe: Recipe, backend: Backend, environment: Mapping[str, str]
) -> Iterator[tuple[str, Any, str, Any]]:
    """Values of the launcher's that differ from the recipe's: where, the value, the recipe's key and its value."""
    train = recipe.train
    precision = {None: None, True: "bf16", False: "no"}[train.bf16]
    told = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no" and told != precision:
        yield "mixed_precision", told, "train.bf16", train.bf16
    rows, each = recipe.parallel.global_batch_size, train.per_device_train_batch_size
    at_once = each * int(environment.get("WORLD_SIZE", "1"))
    accumulated = train.gradient_accumulation_steps if rows is None else rows / at_once
    expected: dict[str, tuple[str, float]] = {
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "gradient_accumulation_steps": ("train.gradient_accumulation_steps", accumulated),
        "train_micro_batch_size_per_gpu": ("train.per_device_train_batch_size", each),
        "train_batch_size": ("parallel.global_batch_size", rows or at_once * accumulated),
    }
    own = backend.own
    for name, (key, value) in expected.items():
        told = environment.get(f"ACCELERATE_{name.upper()}", "auto")
        if told != "auto" and float(told) != value:
            yield f"deepspeed_config.{name}", told, key, value
        if own.get(name, "auto") not in ("auto", value):
            yield f"deepspeed_config_file.{name}", own[name], key, value
    if own.get("fp16", {}).get("enabled") is True:
        yield "deepspeed_config_file.fp16", "true", "train.bf16", train.bf16
    for section in ("optimizer", "scheduler"):
        if section in own:
            key = "train.optim" if section == "optimizer" else "train.lr_scheduler_type"
            yield f"deepspeed_config_file.{section}", own[section].get("type"), key, getattr(train, key[6:])


@dataclass(frozen=True)
class Sizes:
    """What a DeepSpeed configuration needs to know beside the recipe.

    `accumulation`: micro-batches a step; `world`, `local_world`: processes in all and on this node; `hidden`: width
    of the model.
    """

    accumulation: int
    world: int
    local_world: int
    hidden: int


def deepspeed_config(backend: Backend, recipe: Recipe, sizes: Sizes, *, bf16: bool, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, with nothing left to be filled in; the user's own settings on top."""
    rows = recipe.train.per_device_train_batch_size
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": sizes.accumulation,
        "train_batch_size": rows * sizes.accumulation * sizes.world,
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        # torch's own optimizers, as under every other strategy: DeepSpeed's differ in how they treat weight decay.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(backend, recipe, sizes, cuda),
    }
    if bf16:
        # Sums of gradients in bf16 would lose what DDP keeps.
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return _laid_over(config, backend.own)


def _zero(backend: Backend, recipe: Recipe, sizes: Sizes, cuda: bool) -> dict[str, Any]:
    path = recipe.parallel.offload_nvme_path
    # Pinned memory is copied to a GPU beside the computation.
    place: dict[str, Any] = {"device": "nvme", "nvme_path": path} if path else {"device": "cpu"}
    place["pin_memory"] = cuda
    zero: dict[str, Any] = {
        "stage": backend.stage,
        # Two streams of a GPU; a CPU has none, and the gradients would be read before they are summed.
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        # A weight matrix of a layer in each bucket. DeepSpeed's own default is 500 million elements.
        "reduce_bucket_size": sizes.hidden**2,
        "allgather_bucket_size": sizes.hidden**2 * 16,
    }
    if backend.offload_optimizer:
        zero["offload_optimizer"] = dict(place)
    if backend.offload_weights:
        zero["offload_param"] = dict(place)
    if backend.stage == 3:
        zero |= {
            # transformers' proportions: nine tenths of a matrix ahead, and norms and biases kept whole.
            "stage3_prefetch_bucket_size": int(0.9 * sizes.hidden**2),
            "stage3_param_persistence_threshold": 10 * sizes.hidden,
            # Two layers are gathered at a time. By DeepSpeed's default, a billion elements, small models stay whole.
            "stage3_max_live_parameters": 24 * sizes.hidden**2,
            "stage3_max_reuse_distance": 24 * sizes.hidden**2,
            # Weights are written shard by shard (sft_dist/saving.py), and never gathered in one process.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if backend.stage == 3 and backend.node_shards:
        zero[HIERARCHICAL] = sizes.local_world
    return zero


def _laid_over(config: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `config`; "auto" is what stands below."""
    for key, value in own.items():
        if isinstance(value, Mapping):
            config[key] = _laid_over(dict(config.get(key, {})), value)
        elif value != "auto":
            config[key] = value
    return config
