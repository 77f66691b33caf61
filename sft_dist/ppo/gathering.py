"""Weights gathered once for many tokens of a response, where a backend shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.fsdp import FSDPModule

from sft_dist.backend import Backend


@contextmanager
def gathered(trainer: Any, backend: Backend) -> Iterator[Any]:
    """The policy of a trainer's actors, whole on every process for as long as this is open. All ranks open it together.

    Left to itself a layer's weights would be gathered anew for every token.
    """
    actors = trainer.model
    if backend.kind == "fsdp2":
        with _unsharded(actors):
            yield actors.policy
    elif backend.stage == 3:
        with _out_of_zero3(trainer.model_wrapped, actors.policy):
            yield actors.policy
    else:
        yield actors.policy


@contextmanager
def _unsharded(actors: Any) -> Iterator[None]:
    # The first call decides which module FSDP takes for the root of all.
    actors("begin")
    layers = [module for module in actors.policy.modules() if isinstance(module, FSDPModule)]
    actors.unshard()
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()
        actors.reshard()


@contextmanager
def _out_of_zero3(engine: Any, policy: Any) -> Iterator[None]:
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(policy.parameters())):
        # They would give the weights of a layer away behind each of its calls.
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)
