"""LoRA and QLoRA: the adapter around a model, with first values that depend on no number of processes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from sft_dist import fsdp2
from sft_dist.backend import Backend
from sft_dist.config import PeftSection
from sft_dist.heads import SCORE, Head

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


def lora_config(peft: PeftSection, head: Head = "causal") -> LoraConfig | None:
    """peft's configuration of the adapter, or None for full fine-tuning. A reward model's head is trained whole."""
    if not peft.use_peft:
        return None
    from peft import LoraConfig

    modules = peft.lora_modules_to_save
    if head == "reward":
        modules = list(dict.fromkeys([*(modules or []), SCORE]))
    return LoraConfig(
        task_type="CAUSAL_LM" if head == "causal" else "SEQ_CLS",
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=peft.lora_target_modules,
        modules_to_save=modules,
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
    )


def quantization_config(peft: PeftSection, dtype: torch.dtype, bf16: bool, backend: Backend) -> BitsAndBytesConfig:
    """bitsandbytes' configuration of frozen weights in 4 bits. `dtype`: of the weights that are not quantised."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=peft.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=peft.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        # Shards hold numbers of one floating type; a byte can be no part of them.
        bnb_4bit_quant_storage=dtype if backend.shards_weights else torch.uint8,
    )


def keep_quantised(model: Any) -> None:
    """Leave weights in 4 bits as they are when a model on a processor is evaluated.

    bitsandbytes 0.50 packs them anew in the first evaluation, with scales rounded to bf16, for good: losses and
    gradients of the training around it are others than without evaluation (by 1e-3 and by half on a small Llama).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def left_in_fp32(model: Any) -> Iterator[None]:
    """Keep TRL's trainers, while they are made, from casting the adapter over weights in 4 bits to bf16.

    Its values, and their updates, would be rounded.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False)
    if quantized:
        model.is_loaded_in_4bit = False
    try:
        yield
    finally:
        if quantized:
            del model.is_loaded_in_4bit


def wrap(model: Any, peft: PeftSection, backend: Backend, head: Head = "causal") -> Any:
    """The model with its adapter, or the model itself where the recipe has none."""
    config = lora_config(peft, head)
    if config is None:
        return model
    from peft import get_peft_model

    # ZeRO-3 gathers what it keeps whole in one type; an adapter in fp32 beside weights in bf16 would not fit.
    one_type = backend.stage == 3 and not peft.load_in_4bit
    return get_peft_model(model, config, autocast_adapter_dtype=not one_type)


def draw(model: Any, seed: int) -> None:
    """First values of LoRA's matrices, each from a generator of its own, so that shards are parts of the same draw.

    Those of peft: A from U(-1/sqrt(n), 1/sqrt(n)) with n inputs (He et al. 2015 with a = sqrt(5)), B zero; of an
    embedding A zero and B from N(0, 1).
    """
    for name, parameter in model.named_parameters():
        kind = next((part for part in name.split(".") if part.startswith("lora_")), None)
        if kind not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            continue
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
        values = torch.zeros(parameter.shape)
        if kind == "lora_A":
            bound = 1 / math.sqrt(parameter.shape[1])
            values.uniform_(-bound, bound, generator=generator)
        elif kind == "lora_embedding_B":
            values.normal_(generator=generator)
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                start, stop = fsdp2.own_rows(parameter)
                parameter.to_local().copy_(values[start:stop])
            else:
                parameter.copy_(values)
