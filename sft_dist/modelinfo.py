"""What a model's configuration tells without loading it. Free of torch, so that `check` can ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_REWARD = ("ForSequenceClassification",)


def causal_lm_fault(config: Mapping[str, Any], head: str = "causal") -> str | None:
    """Why a configuration is that of no causal language model, or None.

    The list of architectures decides: transformers would load a BERT as a causal model and say nothing. With `head`
    "reward" a model that gives rewards will do, too.
    """
    names = config.get("architectures") or []
    fitting = (*_CAUSAL, *_REWARD) if head == "reward" else _CAUSAL
    if not names or any(name.endswith(fitting) for name in names):
        return None
    return f"not a causal language model ({', '.join(names)}); name one whose architecture ends in ForCausalLM"


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens a model can attend over, or None where it has no limit of its own."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return None


def count_parameters(config: Mapping[str, Any]) -> int | None:
    """About how many weights a model of a configuration has, or None where its sizes have other names.

    Embeddings, and of each layer the four projections of attention and the matrices of the feed-forward block (three
    with a gate, two without); norms and biases are left out. Experts count as many times as there are.
    """

    def size(*names: str) -> int | None:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)

    width, layers, vocabulary = (
        size("hidden_size", "n_embd"), size("num_hidden_layers", "n_layer"), size("vocab_size")
    )  # fmt: skip
    if width is None or layers is None or vocabulary is None:
        return None
    heads = size("num_attention_heads", "n_head") or 1
    head = size("head_dim") or width // heads
    groups = size("num_key_value_heads") or heads
    inner = size("intermediate_size", "ffn_dim", "n_inner") or 4 * width
    gated = "intermediate_size" in config and config.get("hidden_act") in ("silu", "gelu_pytorch_tanh", "swiglu")
    attention = 2 * width * head * heads + 2 * width * head * groups
    block = (3 if gated else 2) * width * inner * (experts(config) or 1)
    learned_positions = config.get("model_type") in ("opt", "gpt2")
    tied = config.get("tie_word_embeddings", learned_positions)
    embeddings = vocabulary * width * (1 if tied else 2)
    positions = (
        (size("max_position_embeddings", "n_positions") or 0) if config.get("model_type") in ("opt", "gpt2") else 0
    )
    return layers * (attention + block) + embeddings + positions * width


def experts(config: Mapping[str, Any]) -> int | None:
    """Experts of a layer, or None for a model without."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(config.get(name), int) and config[name] > 1:
            return int(config[name])
    return None


def quantization_fault(config: Mapping[str, Any]) -> str | None:
    """Why bitsandbytes cannot take a model's weights to 4 bits, or None."""
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "another method")
        return f"its weights are quantised by {method} already; name the model that it was made from"
    if experts(config):
        return (
            "its experts are no linear layers, and bitsandbytes would leave them as they are; "
            "set peft.load_in_4bit=false and model.dtype=bfloat16"
        )
    return None
