"""Loading a causal language model for training or for use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from sft_dist.config import ModelSection
from sft_dist.errors import UserError
from sft_dist.hardware import cpu_has_bf16
from sft_dist.heads import Head, auto_class, draw_head, is_head, prepared_config
from sft_dist.modelinfo import causal_lm_fault, max_positions

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

_KEY = "model.model_name_or_path"
_DROPOUT_NAMES = ("dropout", "_pdrop", "layerdrop")


def load_model(
    path: str,
    model: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    quantized: BitsAndBytesConfig | None = None,
    head: Head = "causal",
    seed: int = 0,
) -> PreTrainedModel:
    """The model in `model.dtype` or `quantized`, its embeddings grown where the tokenizer has more tokens.

    Weights come from safetensors only, unless `model.allow_pickle_weights`. `head`: see `load_trained_model`; one
    that the files do not have is drawn by `seed`. Raises :class:`UserError`.
    """
    config = load_config(path, model)
    if fault := causal_lm_fault(config.to_dict(), head):
        raise UserError(f"{_KEY}: {path}: {fault}")
    options: dict[str, Any] = {"use_safetensors": None if model.allow_pickle_weights else True}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if quantized is not None:
        options["quantization_config"] = quantized
    try:
        loaded, told = auto_class(head).from_pretrained(
            path,
            config=prepared_config(config, head),
            output_loading_info=True,
            revision=model.model_revision,
            trust_remote_code=model.trust_remote_code,
            dtype=getattr(torch, model.dtype),
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{_KEY}: {path}: {_why(error)}") from error
    missing = set(told["missing_keys"])
    draw_head([(n, p) for n, p in loaded.named_parameters() if is_head(n) and n in missing], seed)
    if len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
        loaded.resize_token_embeddings(len(tokenizer))
    loaded.config.pad_token_id = tokenizer.pad_token_id
    found: PreTrainedModel = loaded
    return found


def load_config(path: str, model: ModelSection) -> Any:
    """The configuration of a model, or of the base of an adapter. Raises :class:`UserError` when there is none."""
    try:
        return AutoConfig.from_pretrained(
            adapter_base(path) or path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{_KEY}: {path}: no such model, or no readable config.json: {_why(error)}") from error


def adapter_base(path: str) -> str | None:
    """The base model that a folder's adapter belongs to, or None for a folder that holds no adapter."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").exists():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def row_length(config: Any, max_length: int | None) -> int | None:
    """The longest row in tokens: the recipe's, or the model's own limit. Raises :class:`UserError`."""
    positions = max_positions(config.to_dict())
    if max_length is not None and positions is not None and max_length > positions:
        raise UserError(f"train.max_length: {max_length} is beyond the model's {positions} positions; lower it")
    return positions if max_length is None else max_length


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a model draws anything while it is trained."""
    rates = [rate for _, _, rate in _dropout_rates(model)]
    if not any(name != "p" for _, name, _ in _dropout_rates(model)):
        # Its layers have none of their own, and may read them there.
        named = vars(model.config.get_text_config()).items()  # type: ignore[union-attr, operator]
        rates += [rate for name, rate in named if name.endswith(_DROPOUT_NAMES) and isinstance(rate, float)]
    return any(rate > 0 for rate in rates)


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Train without dropout, also where layers keep their rates as numbers, as OPT's do, and not in modules."""
    for module, name, _ in _dropout_rates(model):
        setattr(module, name, 0.0)


def _dropout_rates(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float]]:
    """The rates of dropout in a model: the module, the name that it has there, and its value."""
    modules = list(model.modules())
    found = [(module, "p", module.p) for module in modules if isinstance(module, torch.nn.Dropout)]
    return found + [
        (module, name, rate)
        for module in modules
        for name, rate in vars(module).items()
        if name.endswith(_DROPOUT_NAMES) and isinstance(rate, float)
    ]


def use_bf16(wanted: bool | None) -> bool:
    """Whether to train in bf16 autocast. Raises :class:`UserError` when asked for without the hardware."""
    if torch.cuda.is_available():
        # Emulation on older cards is slower than fp32 and has lost its point.
        able, device = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        able, device = cpu_has_bf16(), "this processor"
    if wanted and not able:
        raise UserError(f"train.bf16: {device} has no bf16 instructions; set train.bf16=false or leave it out")
    return able if wanted is None else wanted


def _why(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    if "safetensors" in str(error):
        return f"{first} (old .bin weights are read only with model.allow_pickle_weights=true)"
    return first
