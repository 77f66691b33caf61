"""Small random models of the architectures that rows are packed for, and attention that a processor can compute."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

# Heads of 16, for the kernels of flex attention on a GPU take no less.
SIZE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA: dict[str, Any] = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
MIXED: dict[str, Any] = {**GQA, "head_dim": 16, "sliding_window": 6, "pad_token_id": 0,
                         "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 64},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160,
             "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**SIZE, "intermediate_size": 48},
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 6},
    "qwen2": GQA,
    "gemma": {**GQA, "head_dim": 16},
    "phi": {**SIZE, "intermediate_size": 48},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 16},
    "gpt_oss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "biogpt": {**SIZE, "intermediate_size": 48},
    "xglm": {"vocab_size": 96, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
             "max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip
# Sinks of gpt-oss are computed by eager attention alone on a processor, and the library has no other for XGLM.
EAGER_ONLY = ("gpt_oss", "xglm")
SDPA = [name for name in MODELS if name not in EAGER_ONLY]
FLEX = [name for name in SDPA if name not in ("gpt2", "biogpt")]
HAVING = {"eager": list(MODELS), "sdpa": SDPA, "flex_attention": FLEX}
PAIRS = [(name, attention) for name in MODELS for attention, names in HAVING.items() if name in names]
# BLOOM makes its biases from a mask of two dimensions; the others tell tokens of each other beside attention.
UNPACKED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "jamba": {**GQA, "pad_token_id": 0, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
              "use_mamba_kernels": False, "mamba_d_state": 4},
    "lfm2": {**GQA, "pad_token_id": 0, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}  # fmt: skip


def model_of(name: str, attention: str | None = "sdpa") -> Any:
    """A model in fp32, always the same one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(MODELS | UNPACKED)[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@contextmanager
def flex_on_a_processor() -> Iterator[None]:
    """Flex attention as torch defines it, uncompiled, forward and backward.

    Torch has the backward on any device and refuses it on a CPU, for which it has no compiled kernel.
    """
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", return_value=None),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def with_flash_on_a_processor(model: Any) -> Any:
    """The model with an attention that reads borders as flash attention does, from `cu_seq_lens_q` and nothing else."""
    AttentionInterface.register("flash_by_documents", _by_documents)
    # The library would look for a package of that name if it loaded the model with it.
    model.config._attn_implementation = "flash_by_documents"
    return model


def _by_documents(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    borders = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    found = []
    for start, end in itertools.pairwise(borders):
        place = torch.arange(end - start)
        seen = place <= place[:, None]
        if sliding_window is not None:
            seen &= place > place[:, None] - sliding_window
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        found.append(functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2), None
