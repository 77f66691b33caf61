"""LoRA's adapters: read from a file or a checkpoint, and merged into one weight of the base at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_dist.errors import UserError
from sft_dist.export.tensors import COPY_AGAIN, Tensors

_PREFIX = "base_model.model."
_MATRIX = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_SAVED = re.compile(r"(.+)\.modules_to_save\.default\.(.+)")
# What does not change how matrices are merged, or is followed here. Anything else that is set is refused.
_KNOWN = frozenset(
    ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
     "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core",
     "qalora_group_size", "init_lora_weights", "bias", "eva_config", "runtime_config")
)  # fmt: skip
_HEADS = ("classifier", "score")
# Other first values are taken out of the base, which is then no longer the one that the adapter names.
_FIRST_VALUES = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass
class Adapter:
    """An adapter's tensors by the module that they change, and those that take the place of the base's own."""

    config: dict[str, Any]
    tensors: Tensors
    origin: Path
    matrices: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def scale(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        r, alpha = self.rank(module), self._pattern("alpha_pattern", "lora_alpha", module)
        return float(alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r)

    def rank(self, module: str) -> int:
        """The rank of a module's matrices."""
        return int(self._pattern("rank_pattern", "r", module))

    def _pattern(self, patterns: str, otherwise: str, module: str) -> float:
        for key, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        return float(self.config[otherwise])

    def is_saved(self, name: str) -> bool:
        """Whether a replaced tensor belongs to a module that was trained whole, and is not a copy of the base's."""
        saved = self.config.get("modules_to_save") or ()
        return any(f".{name}".endswith(f".{one}.{name.rsplit('.', 1)[-1]}") or f".{one}." in f".{name}"
                   for one in saved)  # fmt: skip

    def merged(self, module: str, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        """A weight with its adapter, in fp32 or wider. `transposed`: its rows are inputs, as in Conv1D and embeddings.

        With V the base's weight, rows its outputs: V + s B A; under DoRA each row then gets the learnt length.
        """
        keys = self.matrices[module]
        lead = "lora_embedding_" if "lora_embedding_A" in keys else "lora_"
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = (self.tensors.read(keys[f"{lead}{letter}"]).to(kind) for letter in "AB")
        base = weight.to(kind)
        total = (b @ a).mul_(self.scale(module)).add_(base.T if transposed else base)
        if "lora_magnitude_vector" in keys:
            length = self.tensors.read(keys["lora_magnitude_vector"]).to(kind).reshape(-1)
            total.mul_((length / torch.linalg.norm(total, dim=1))[:, None])
        return total.T if transposed else total

    def check(self, module: str, shape: tuple[int, ...], transposed: bool) -> None:
        """Raises :class:`UserError` where a module's matrices are missing or do not fit a weight of this shape."""
        keys = self.matrices[module]
        lead = "lora_embedding_" if any(k.startswith("lora_embedding_") for k in keys) else "lora_"
        wanted = [f"{lead}A", f"{lead}B", *(["lora_magnitude_vector"] if self.config.get("use_dora") else [])]
        missing = next((kind for kind in wanted if kind not in keys), None)
        if missing is not None or len(keys) != len(wanted):
            raise UserError(f"{self.origin}: {module}: {missing or 'more than'} {'is missing' if missing else wanted}; "
                            f"{COPY_AGAIN}")  # fmt: skip
        out, into = reversed(shape) if transposed else shape
        rank = self.rank(module)
        sizes = {f"{lead}A": (rank, into), f"{lead}B": (out, rank), "lora_magnitude_vector": (out,)}
        for kind in wanted:
            have = self.tensors.shape(keys[kind])
            if have != sizes[kind] and not (kind == "lora_magnitude_vector" and math.prod(have) == out):
                raise UserError(
                    f"{self.origin}: {module}.{kind} has the shape {have} where {sizes[kind]} is wanted; "
                    "name the model that the adapter was trained on by --base"
                )


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are the names of an adapted model's tensors."""
    return any(name.startswith(_PREFIX) or f".{_PREFIX}" in name for name in names)


def read_adapter(tensors: Tensors, config: dict[str, Any], origin: Path, whole_model: bool) -> Adapter:
    """The adapter among tensors; `whole_model`: the base's frozen weights may lie among them and are passed over.

    Raises :class:`UserError` for kinds of adapters that are not merged here.
    """
    _refuse_others(config, origin)
    adapter = Adapter(config, tensors, origin)
    for key in tensors:
        name = key.removeprefix("module.").replace("_orig_mod.", "").removeprefix(_PREFIX)
        if found := _MATRIX.fullmatch(name):
            adapter.matrices.setdefault(found[1], {})[found[2]] = key
        elif found := _SAVED.fullmatch(name):
            adapter.replaced[f"{found[1]}.{found[2]}"] = key
        elif "lora_" in name or "trainable_tokens" in name:
            raise UserError(f"{origin}: {name} is of a kind of adapter that is not merged; merge it with peft")
        elif not whole_model:
            adapter.replaced[name.replace(".base_layer.", ".")] = key
    wanted = list(config.get("modules_to_save") or ())
    if config.get("task_type") == "SEQ_CLS":
        # peft names heads of every name that it knows, of which a model has one.
        wanted = [one for one in wanted if one not in _HEADS] + ["score"]
    lost = [one for one in wanted if not any(f".{one}." in f".{name}" for name in adapter.replaced)]
    if lost or not (adapter.matrices or adapter.replaced):
        raise UserError(f"{origin}: {lost[0] if lost else 'every tensor'} of the adapter is missing; {COPY_AGAIN}")
    return adapter


def _refuse_others(config: dict[str, Any], origin: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{origin}: an adapter of type {kind}; only LoRA is merged, use peft's merge_and_unload")
    other = next((key for key, value in config.items() if value and key not in _KNOWN), None)
    if config.get("bias", "none") != "none":
        other = "bias"
    first = config.get("init_lora_weights", True)
    if first not in _FIRST_VALUES:
        other = "init_lora_weights"
    if other is not None:
        raise UserError(f"{origin}: {other}={config[other]} is not merged here; use peft's merge_and_unload")
    lacking = next((key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)), None)
    if lacking is not None:
        raise UserError(f"{origin}: {lacking} is missing; {COPY_AGAIN}")


def file_names(adapter: Adapter) -> dict[str, str]:
    """The tensors of an adapter by the names that peft gives them in a file, and their keys."""
    names = dict[str, str]()
    for module, keys in adapter.matrices.items():
        for kind, key in keys.items():
            plain = kind.startswith("lora_embedding_") or kind == "lora_magnitude_vector"
            names[f"{_PREFIX}{module}.{kind}{'' if plain else '.weight'}"] = key
    for name, key in adapter.replaced.items():
        module, leaf = name.rsplit(".", 1)
        # peft looks for the copy of a weight under what it wraps the weight in.
        inner = ".base_layer" if module in adapter.matrices else ""
        names[f"{_PREFIX}{module}{inner}.{leaf}"] = key
    return names
