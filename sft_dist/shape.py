"""A model's shape in small: the same architecture with the same switches, a few narrow layers, random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Sizes by the names that configurations have for them; those of a model that it does not have are left out.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
# Documents of a proof are some dozens of tokens: a window shorter than that shows whether it is kept.
_WINDOW = 32
_LEAST_LAYERS = 2


def small_config(config: Any, vocabulary: int | None = None) -> Any:
    """A copy of a configuration with narrow layers, as few as show every kind of layer.

    `vocabulary`: tokens of the small model, None for as many as before. Dropout is off.
    """
    small = copy.deepcopy(config.get_text_config())
    heads, groups = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    # Such as OPT-350M's embeddings, which are narrower than its layers.
    narrow = getattr(small, "word_embed_proj_dim", small.hidden_size) != small.hidden_size
    for name, size in _SIZES.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    if groups is not None:
        small.num_key_value_heads = _SIZES["num_attention_heads"] if groups == heads else 2 if groups > 1 else 1
    if hasattr(small, "word_embed_proj_dim"):
        small.word_embed_proj_dim = small.hidden_size // (2 if narrow else 1)
    if getattr(small, "sliding_window", None):
        small.sliding_window = _WINDOW
    if vocabulary is not None:
        small.vocab_size = vocabulary
    for name in list(vars(small)):
        if name.endswith(("dropout", "_pdrop", "layerdrop")) and isinstance(getattr(small, name), float):
            setattr(small, name, 0.0)
    _cut(small)
    return small


def _cut(config: Any) -> None:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = _LEAST_LAYERS
    if kinds:
        layers = max(layers, 1 + max(kinds.index(kind) for kind in set(kinds)))
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models made inside are whole, though the training's own is sharded by ZeRO-3."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def small_model(config: Any, attn_implementation: str | None, seed: int) -> Any:
    """A model of a small configuration in fp32, with random weights that are the same in every process."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
