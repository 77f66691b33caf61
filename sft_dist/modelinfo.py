"""What a model's configuration tells without loading it. Free of torch, so that `check` can ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def causal_lm_fault(config: Mapping[str, Any]) -> str | None:
    """Why a configuration is that of no causal language model, or None.

    The list of architectures decides: transformers would load a BERT as a causal model and say nothing.
    """
    names = config.get("architectures") or []
    if not names or any(name.endswith(_CAUSAL) for name in names):
        return None
    return f"not a causal language model ({', '.join(names)}); name one whose architecture ends in ForCausalLM"


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens a model can attend over, or None where it has no limit of its own."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return None
