"""A model's parameters sharded by torch's FSDP2, before the trainer sees it.

accelerate would shard it as well, but from a whole copy: here weights go from the files straight into the shards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


def make_mesh(world: int, local_world: int, node_shards: bool) -> DeviceMesh:
    """All processes as one row of shards, or, with `node_shards`, nodes x processes of a node."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if node_shards:
        return init_device_mesh(device, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world,), mesh_dim_names=("shard",))


def shard(model: Any, mesh: DeviceMesh, bf16: bool, checkpointing: dict[str, Any] | None) -> None:
    """Shard every layer, and what is around the layers, in place.

    `bf16`: compute in bf16 and sum gradients in fp32, over weights as they are. `checkpointing`: arguments of
    `torch.utils.checkpoint` where activations are recomputed, else None.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None
    )
    for layer in layers(model):
        if checkpointing is not None:
            # Inside of FSDP's hooks: a layer's weights are gathered once for recomputation and gradient, not twice.
            layer.forward = partial(checkpoint, layer.forward, **checkpointing)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embeddings, last norm and head stay gathered between forward and backward: they are needed first and last.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def announce_to_accelerate() -> None:
    """Let accelerate know of FSDP on processors, too, before an Accelerator is made.

    accelerate 1.15 looks for it among the kinds of GPUs only: on a CPU it would wrap the sharded model for DDP, or,
    given a whole one, train by DDP and say nothing. A test fails when it has learnt this.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def layers(model: Any) -> list[torch.nn.Module]:
    """The blocks of a transformers model, as the model names them itself; none that lies in another."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in names]
    outer = [name for name, _ in found]
    return [module for name, module in found if not any(name.startswith(f"{other}.") for other in outer)]


def materialize(model: torch.nn.Module, device: torch.device) -> None:
    """Give the shards of a model whose parameters are on the meta device memory, of no value yet."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model._apply(place)  # type: ignore[no-untyped-call]


def reshard(model: torch.nn.Module) -> None:
    """Take up the shards again: what is around the layers stays gathered after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """The rows of a parameter that this process holds: like `torch.chunk`, and so maybe none."""
    mesh = parameter.device_mesh
    size = parameter.shape[0] if parameter.dim() else 1
    each = -(-size // mesh["shard"].size()) if mesh.ndim > 1 else -(-size // mesh.size())
    rank = mesh.get_local_rank("shard")
    return min(rank * each, size), min((rank + 1) * each, size)
