"""Models with a scalar head: reward and value models, whose head may have no values yet."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sft_dist import fsdp2

Head = Literal["causal", "reward"]
# The name that transformers gives the head of a model for sequence classification, in OPT as in Llama.
SCORE = "score"


def auto_class(head: Head) -> Any:
    """The class of transformers that makes such models."""
    return AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification


def prepared_config(config: Any, head: Head) -> Any:
    """The configuration of a model with a head of one label where it is to give rewards."""
    if head == "reward":
        config.num_labels = 1
    return config


def is_head(name: str) -> bool:
    """Whether a weight's name is that of the head."""
    return SCORE in name.split(".")


def draw_head(parameters: Iterable[tuple[str, Any]], seed: int) -> None:
    """First values of a head, alike however it is sharded: N(0, 1 / (n + 1)) with n inputs (Stiennon et al. 2020).

    All ranks call it together.
    """
    for name, parameter in parameters:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(f"head {name.rpartition('.')[2]}".encode()))
        values = torch.zeros(shape)
        if len(shape) > 1:
            values.normal_(0, 1 / math.sqrt(shape[1] + 1), generator=generator)
        put_values(parameter, values)


@torch.no_grad()
def put_values(parameter: Any, values: torch.Tensor) -> None:
    """Give a parameter values, (its whole shape), however it is sharded. All ranks call it together."""
    if isinstance(parameter, DTensor):
        start, stop = fsdp2.own_rows(parameter)
        local = parameter.to_local()
        local.copy_(values[start:stop].reshape(local.shape))
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if parameter.numel():
                parameter.copy_(values)
    else:
        parameter.copy_(values)
