"""The environment of each worker process, the one that accelerate's launcher would have given it.

`sft-dist run` starts the workers itself. accelerate's launcher imports torch first (seconds), turns every exit
code of a worker into 1 behind a page of traceback, and keeps SIGUSR1 and SIGUSR2 to itself. The training plane
must not be able to tell the two apart, so this module reads the same files in `ds_configs/` and sets what
accelerate sets; a test compares the two for each file. Left out is what speaks of torch's elastic agent,
which does not exist here (`ABSENT`).
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_dist import backend
from sft_dist.errors import UserError

STRATEGIES = ("single", *backend.STRATEGIES)

# What the elastic agent tells its workers about itself, and why it must not be told here.
ABSENT = {
    "TORCHELASTIC_RUN_ID": "name of the agent's rendezvous; its presence means that there is an agent",
    "TORCHELASTIC_USE_AGENT_STORE": "says that the agent serves the key-value store; here rank 0 does",
    "TORCHELASTIC_ERROR_FILE": "file that the agent reads a traceback from",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "signals that the agent acts on",
    "TORCHELASTIC_MAX_RESTARTS": "how often the agent may start the workers again",
    "TORCHELASTIC_RESTART_COUNT": "how often it has",
}

_MACHINE_KEYS = {
    "compute_environment": "LOCAL_MACHINE",
    "num_machines": 1,
    "num_processes": None,
    "main_process_port": None,
    "distributed_type": None,
    "deepspeed_config": None,
    "fsdp_config": None,
}
# The variable that accelerate sets for a key of `deepspeed_config`, or None for a key of this project's own, of
# which accelerate passes the name alone.
_DEEPSPEED_KEYS = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero_hpz_partition_size": None,
}
# What accelerate sets for FSDP, with its defaults where a file says nothing.
_FSDP_VARIABLES = {
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
_FSDP_KEYS = ("fsdp_version", "fsdp_state_dict_type", "fsdp_cpu_ram_efficient_loading", "fsdp_sharding_strategy")
_KINDS = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")


def config_path(strategy: str) -> Path:
    """The Accelerate file of a strategy. Raises :class:`UserError` when there is no such strategy."""
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy: {strategy!r} is not a strategy; take one of {', '.join(STRATEGIES)}")
    # In a checkout and in an installed wheel alike the folder lies beside this package; looked for there
    # first, because a `ds_configs` of the user's own in the working directory would come first otherwise.
    beside = Path(__file__).resolve().parent.parent / "ds_configs" / f"{strategy}.yaml"
    if beside.is_file():
        return beside
    try:
        packaged = Path(str(importlib.resources.files("ds_configs"))) / f"{strategy}.yaml"
    except (ModuleNotFoundError, TypeError):
        packaged = beside
    if not packaged.is_file():
        raise UserError(f"{beside}: is missing from this installation; install sft-dist again")
    return packaged


def worker_environments(
    strategy: str,
    processes: int,
    *,
    master_addr: str = "127.0.0.1",
    master_port: int,
    omp_num_threads: int,
    base: Mapping[str, str],
    node: int = 0,
    nodes: int = 1,
) -> list[dict[str, str]]:
    """One environment per process of a node, by local rank, each `base` with the variables of the strategy on top.

    `processes` are those of each of the `nodes`, of which this is number `node`. `omp_num_threads` is what
    `--num_cpu_threads_per_process` is to accelerate. Raises :class:`UserError` for an unknown strategy, for `single`
    on several processes, and for a file with settings that only accelerate itself understands.
    """
    path = config_path(strategy)
    config = _read(path)
    common = dict(base) | {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": str(omp_num_threads)}
    kind = config["distributed_type"]
    if kind == "NO":
        if processes * nodes != 1:
            raise UserError(f"parallel.strategy: {strategy} is one process, not {processes * nodes}; take ddp or zero2")
        return [common | _dynamo() | {"ACCELERATE_USE_CPU": "False"}]
    if kind == "DEEPSPEED":
        common |= _deepspeed(config.get("deepspeed_config") or {}, base)
    else:
        common |= _dynamo() | (_fsdp(config.get("fsdp_config") or {}) if kind == "FSDP" else {})
    common |= {
        "WORLD_SIZE": str(processes * nodes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(nodes),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(processes * nodes),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": base.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    ranks = [(str(node * processes + local), str(local)) for local in range(processes)]
    return [common | {"RANK": rank, "LOCAL_RANK": local, "ROLE_RANK": rank} for rank, local in ranks]


def _read(path: Path) -> dict[str, Any]:
    """A file of `ds_configs/`, refused where it says what this module would not do as accelerate does it."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}".replace("\n", " ")) from error
    if not isinstance(config, dict) or config.get("distributed_type") not in _KINDS:
        raise UserError(f"{path}: distributed_type is none of 'NO', {', '.join(_KINDS[1:])}; mend it")
    for key, value in config.items():
        if key not in _MACHINE_KEYS or _MACHINE_KEYS[key] not in (None, value):
            raise UserError(f"{path}: {key}: {value} is for `accelerate launch` only; leave it out for `sft-dist run`")
    for section, known in (("deepspeed_config", tuple(_DEEPSPEED_KEYS)), ("fsdp_config", _FSDP_KEYS)):
        for key in config.get(section) or {}:
            if key not in known:
                raise UserError(f"{path}: {section}.{key} is for `accelerate launch` only; leave it out here")
    return config


def _dynamo() -> dict[str, str]:
    return {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    }


def _deepspeed(settings: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, str]:
    paths = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_CONFIG_DS_FIELDS": ",".join(settings),
        **{name: str(value) for key, value in settings.items() if (name := _DEEPSPEED_KEYS[key])},
        "PYTHONPATH": os.pathsep.join([*paths, os.getcwd()]),
        # DeepSpeed sets it when imported, which accelerate's launcher does. torch then looks for GPUs through
        # NVML, so that a process may still fork afterwards.
        "PYTORCH_NVML_BASED_CUDA_CHECK": base.get("PYTORCH_NVML_BASED_CUDA_CHECK", "1"),
    }


def _fsdp(settings: Mapping[str, Any]) -> dict[str, str]:
    given = {key.upper(): _word(value) for key, value in settings.items()}
    return {"ACCELERATE_USE_FSDP": "true", **_FSDP_VARIABLES, **given}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
