"""Whether the rows of a run are packed, and how they are fed: what the recipe asks for and the loaded model proves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from sft_dist.attention import Way, text_config
from sft_dist.data.arrangement import Arrangement
from sft_dist.errors import UserError
from sft_dist.packing_proof import prove
from sft_dist.render.wording import count
from sft_dist.shape import small_config, small_model, whole_weights

_KEY = "data.packing"


def packed_way(
    model: Any, wanted: bool | Literal["required"], bf16: bool, say: Callable[[str], None], sharded: bool = False
) -> Way | None:
    """The exact way to feed packed rows to a model, or None where rows are not packed.

    All ranks call it together and get rank 0's answer. `bf16`: training runs in bf16 autocast. `sharded`: no process
    has all weights; the proof is then of the same architecture in small, for a leak lies in the code and not in the
    weights. Raises :class:`UserError` where packing is required and no way is exact.
    """
    if not wanted:
        return None
    if sharded:
        say("packing is proven on this architecture in small: the weights are sharded")
        model = _in_small(model)
    # Flash attention takes no fp32; all else is proven in the precision of the weights, where a leak shows best.
    flash = "flash" in str(text_config(model.config)._attn_implementation)
    proof = prove(model, autocast=torch.bfloat16 if bf16 and flash else None)
    say(proof.line())
    way = _of_rank_0(proof.way)
    if way is None and wanted == "required":
        raise UserError(
            f"{_KEY}: no way of packing is exact on {proof.architecture}, and packing is required; "
            f"set {_KEY}=false, or another model.attn_implementation"
        )
    if way is None:
        say("rows stay unpacked: one document each, those of like length in one micro-batch")
    return way


def _in_small(model: Any) -> Any:
    device = next(model.parameters()).device
    kernel = text_config(model.config)._attn_implementation
    # ZeRO-3 would shard this one as well.
    with whole_weights():
        return small_model(small_config(model.config), kernel, seed=0).to(device)


def packed_length(wanted: bool | Literal["required"], limit: int | None) -> int | None:
    """Tokens of a packed row, None where rows are not packed. Raises :class:`UserError` where nothing limits them."""
    if wanted and limit is None:
        raise UserError(
            f"{_KEY}: rows need a length, and neither the recipe nor the model has one; set train.max_length"
        )
    return limit if wanted else None


def packed_line(arrangement: Arrangement) -> str:
    """What packing comes to in an epoch, in a line for people."""
    documents, rows = count(len(arrangement.rows(0).rows), "document"), count(len(arrangement), "row")
    return f"{documents} in {rows} of {arrangement.capacity:,} tokens, {arrangement.fill():.1%} full"


def _of_rank_0(way: Way | None) -> Way | None:
    """Ranks may differ by a round-off, and rows have to be the same on all."""
    from accelerate.utils import broadcast_object_list

    found = [way.value if way is not None else None]
    broadcast_object_list(found)
    return None if found[0] is None else Way(found[0])
