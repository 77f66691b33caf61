"""How a row of several documents is fed to a model so that no document sees another.

What a model makes of packed rows depends on its architecture, the attention implementation and the library's
version, and where it goes wrong nothing says so: OPT takes `position_ids` and builds no mask from them. So nothing
is believed here: this module knows the ways there are, and `sft_dist.packing_proof` tries them on the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask


class Way(Enum):
    """A form in which a forward can be told where documents end. Positions begin anew at each in all of them.

    POSITIONS: no mask at all. The library takes a jump in the positions for a border and builds the mask itself,
    which is best where it does, since it knows its layers; it does so only without `attention_mask` and cache.
    MASK4D: a mask for every pair of tokens, for models that take positions and build nothing from them (OPT).
    FLEX: the same as a BlockMask, which flex attention needs to leave out blocks instead of masking them.
    VARLEN: all rows as one without padding, with the borders in `cu_seq_lens`: what flash attention and the kernels
    of linear attention work on. Flash attention reads positions only in a batch of one row.
    """

    POSITIONS = "positions"
    MASK4D = "mask4d"
    FLEX = "flex"
    VARLEN = "varlen"


def ways(model: torch.nn.Module) -> list[Way]:
    """The ways to try for a loaded model, the best first.

    The attention implementation decides and the architecture does not: a list of architectures would grow old,
    and a way that leaks costs the proof a few short forwards.
    """
    implementation = str(text_config(model.config)._attn_implementation)
    if "flash" in implementation:
        return [Way.VARLEN, Way.POSITIONS]
    if implementation == "flex_attention":
        return [Way.POSITIONS, Way.FLEX, Way.MASK4D, Way.VARLEN]
    if implementation in ("sdpa", "eager"):
        # Linear attention beside sdpa reads cu_seq_lens, where its kernels are installed.
        return [Way.POSITIONS, Way.MASK4D, Way.VARLEN]
    return [Way.VARLEN, Way.POSITIONS, Way.FLEX, Way.MASK4D]


def feed(batch: Mapping[str, Any], way: Way, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What the model's forward gets for a batch of :class:`PackedCollator`; keys it does not know are passed on.

    `config`: the model's. `dtype`: that of its weights, which an additive mask has to share. Labels are among what
    comes back, since VARLEN joins the rows: all of its tensors are (1, tokens), else (rows, length).
    Raises ValueError for a kind of layer that no mask is known for.
    """
    fed = {name: value for name, value in batch.items() if name not in ("document_ids", "attention_mask")}
    # A cache, which configurations ask for by default, makes the library ignore jumps in the positions.
    fed["use_cache"] = False
    if way is Way.VARLEN:
        return fed | _joined(batch)
    if way is Way.MASK4D:
        fed["attention_mask"] = _by_layer(_masks(batch, text_config(config), dtype))
    if way is Way.FLEX:
        fed["attention_mask"] = _by_layer(_block_masks(batch, text_config(config)))
    return fed


def text_config(config: Any) -> Any:
    """The configuration of the language model within a configuration; most are it themselves."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _by_layer(masks: dict[str, Any]) -> Any:
    """One mask as it is, several as the mapping that models of mixed layers take."""
    return masks if len(masks) > 1 else next(iter(masks.values()))


_Rule = Callable[["Tensor", "Tensor"], "Tensor"]


def _rules(config: Any) -> dict[str, _Rule]:
    """For each kind of layer: whether a query sees a key, from both their positions within one document."""
    kinds = getattr(config, "layer_types", None) or [_only_kind(config)]
    return {kind: _rule(kind, config) for kind in dict.fromkeys(kinds)}


def _only_kind(config: Any) -> str:
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def _rule(kind: str, config: Any) -> _Rule:
    if kind == "full_attention":
        return lambda query, key: key <= query
    if kind == "sliding_attention":
        window = config.sliding_window
        return lambda query, key: (key <= query) & (key > query - window)
    if kind == "chunked_attention":
        chunk = config.attention_chunk_size
        return lambda query, key: (key <= query) & (key // chunk == query // chunk)
    raise ValueError(f"no mask is known for layers of kind {kind}")


def _masks(batch: Mapping[str, Any], config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Masks (rows, 1, length, length): True where a query sees a key, or, additive, 0 there and `dtype`'s least."""
    documents, positions = batch["document_ids"][:, None], batch["position_ids"][:, None]
    same = documents[..., None] == documents[..., None, :]
    masks = {k: same & rule(positions[..., None], positions[..., None, :]) for k, rule in _rules(config).items()}
    if config._attn_implementation == "sdpa":
        return masks
    # Eager attention adds the mask to its scores: True would mean no more than one added.
    return {
        kind: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        for kind, mask in masks.items()
    }


def _block_masks(batch: Mapping[str, Any], config: Any) -> dict[str, BlockMask]:
    from torch.nn.attention.flex_attention import create_block_mask

    documents, positions = batch["document_ids"], batch["position_ids"]

    def seen_by(rule: _Rule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same: Tensor = documents[row, query] == documents[row, key]
            return same & rule(positions[row, query], positions[row, key])

        return seen

    rows, length = documents.shape
    return {
        kind: create_block_mask(seen_by(rule), rows, None, length, length, device=documents.device.type)
        for kind, rule in _rules(config).items()
    }


def _joined(batch: Mapping[str, Any]) -> dict[str, Any]:
    kept = batch["document_ids"] > 0
    names = ("input_ids", "labels", "position_ids", "sources")
    joined = {name: batch[name][kept][None] for name in names if name in batch}
    first = joined["position_ids"][0] == 0
    borders = functional.pad(first.nonzero().flatten(), (0, 1), value=first.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    # Two names for each, as in cross attention, and the number of its document for each token: convolutions read it.
    return joined | {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": (first.cumsum(0) - 1).to(torch.int32)[None],
    }
