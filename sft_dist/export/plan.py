"""What the output will hold: the tensors of a model by the names of its files, and how each is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sft_dist.errors import UserError
from sft_dist.export.lora import Adapter, file_names
from sft_dist.export.tensors import COPY_AGAIN, FLOATS, Made, Tensors, converted
from sft_dist.heads import Head, auto_class, is_head, prepared_config
from sft_dist.straight import build, without_values


@dataclass
class Plan:
    """The tensors of the output, and what the configuration has to say of them beside what it said before."""

    tensors: list[Made]
    settings: dict[str, Any] = field(default_factory=dict)


def head_of(names: Iterable[str]) -> Head:
    """Which head a model with tensors of these names has."""
    return "reward" if any(map(is_head, names)) else "causal"


def head_settings(model: Any, head: Head) -> dict[str, Any]:
    """What the configuration has to say of a reward model; that of its base may be a causal language model's."""
    if head == "causal":
        return {}
    return {"architectures": [type(model).__name__], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def blank_model(folder: Path, rows: int | None = None, head: Head = "causal") -> Any:
    """A model of a folder's configuration without values; `rows`: of its embeddings. Raises :class:`UserError`."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if rows is not None:
            config.get_text_config().vocab_size = rows
        return build(lambda: auto_class(head).from_config(prepared_config(config, head)), without_values())
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder / 'config.json'}: no causal language model is made of it: {line}") from error


def plain(tensors: Tensors, dtype: torch.dtype | None, model: Any | None, origin: Path) -> Plan:
    """The tensors of a model directory under the names that they have. `model`: to see whether one is missing."""
    if model is not None:
        known = _weights(model)
        # A file that has names of its own is one that transformers renames, fuses or splits.
        if all(any(one in known for one in _spellings(name, model)) for name in tensors):
            _places(tensors, model, origin)
    return Plan([_copied(tensors, name, name, dtype) for name in tensors])


def fitted(tensors: Tensors, dtype: torch.dtype | None, folder: Path, origin: Path) -> Plan:
    """The tensors of a checkpoint, one for each weight of the model of the configuration in `folder`."""
    head = head_of(tensors)
    model = blank_model(folder, head=head)
    settings = head_settings(model, head)
    rows = _rows_of_embeddings(tensors, model)
    if rows not in (None, model.config.get_text_config().vocab_size):
        model = blank_model(folder, rows, head)
        settings["vocab_size"] = rows
    places = _places(tensors, model, origin)
    known = set(model.state_dict(keep_vars=True))
    extra = next((name for name in tensors if name not in known and name not in places.values()), None)
    if extra is not None:
        raise UserError(f"{origin}: holds {extra}, which the model of {folder / 'config.json'} has not")
    return Plan([_copied(tensors, key, name, dtype) for name, key in places.items()], settings)


def merged(base: Tensors, adapter: Adapter, dtype: torch.dtype | None, folder: Path) -> Plan:
    """The base's tensors with the adapter's in them. `folder`: of the base."""
    head = head_of(adapter.replaced)
    model = blank_model(folder, head=head)
    places = _places(base, model, folder, strict=False) or {name: name for name in base}
    # A base that is a causal language model has no such head.
    heads = {n: key for n, key in adapter.replaced.items() if is_head(n) and n not in places}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    changed = {f"{module}.weight" for module in adapter.matrices} | set(filter(adapter.is_saved, adapter.replaced))
    settings = head_settings(model, head)
    if any(name in changed or source in changed for name, source in ties.items()):
        # What was one weight in the base are two: the adapter changes only one of the uses, or each by itself.
        places.update({name: places[source] for name, source in ties.items() if source in places})
        settings["tie_word_embeddings"] = False
    unknown = next((n for n in [*changed, *adapter.replaced] if n not in {**places, **heads, **ties}), None)
    if unknown is not None:
        raise UserError(f"{adapter.origin}: changes {unknown}, which {folder} has not; name the right model by --base")
    embeddings = _embedding_names(model)
    made = []
    for name, key in places.items():
        made.append(_adapted(base, key, name, adapter, model, dtype))
        if made[-1].shape != base.shape(key):
            if name not in embeddings or made[-1].shape[1:] != base.shape(key)[1:]:
                raise UserError(
                    f"{adapter.origin}: {name} has the shape {made[-1].shape}, the base's {base.shape(key)}"
                )
            settings["vocab_size"] = made[-1].shape[0]
    _same_rows(made, embeddings, adapter)
    made += [_copied(adapter.tensors, key, name, dtype) for name, key in heads.items()]
    return Plan(made, settings)


def adapter_alone(adapter: Adapter, dtype: torch.dtype | None) -> Plan:
    """The adapter's own tensors, by the names of peft's files."""
    return Plan([_copied(adapter.tensors, key, name, dtype) for name, key in file_names(adapter).items()])


def _same_rows(made: list[Made], embeddings: set[str], adapter: Adapter) -> None:
    if len({tensor.shape[0] for tensor in made if tensor.name in embeddings}) > 1:
        raise UserError(
            f"{adapter.origin}: embeddings and head have different numbers of rows; save the adapter with both"
        )


def _adapted(base: Tensors, key: str, name: str, adapter: Adapter, model: Any, dtype: torch.dtype | None) -> Made:
    """A tensor of the base, another in its place, or the sum of it and the adapter's."""
    module = name.removesuffix(".weight")
    source, at = (adapter.tensors, adapter.replaced[name]) if name in adapter.replaced else (base, key)
    kind = _type(base.dtype(key), dtype)
    if module not in adapter.matrices or not name.endswith(".weight"):
        return _copied(source, at, name, kind)
    transposed = _is_transposed(model, module, adapter)
    adapter.check(module, source.shape(at), transposed)

    def make() -> torch.Tensor:
        return converted(adapter.merged(module, source.read(at), transposed), kind, name)

    return Made(name, source.shape(at), kind, make)


def _is_transposed(model: Any, module: str, adapter: Adapter) -> bool:
    from transformers.pytorch_utils import Conv1D

    layer = model.get_submodule(module)
    if not isinstance(layer, torch.nn.Linear | Conv1D | torch.nn.Embedding):
        raise UserError(f"{adapter.origin}: {module} is a {type(layer).__name__}, which is not merged; use peft")
    # The module tells for sure; fan_in_fan_out is one setting for all of them, which peft corrects when it loads.
    return not isinstance(layer, torch.nn.Linear)


def _weights(model: Any) -> dict[str, tuple[int, ...]]:
    """Sizes of a model's weights; those that are others under a second name are left out."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items() if n not in tied}


def _spellings(name: str, model: Any) -> tuple[str, ...]:
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix), prefix + name)


def _places(tensors: Tensors, model: Any, origin: Path, strict: bool = True) -> dict[str, str]:
    """Where each weight of a model lies; empty where one has no place and `strict` is not asked for."""
    found: dict[str, str] = {}
    for name, shape in _weights(model).items():
        key = next((one for one in _spellings(name, model) if one in tensors), None)
        if key is None and not strict:
            if is_head(name):
                continue
            return {}
        if key is None:
            raise UserError(f"{origin}: the tensor {name} is missing; {COPY_AGAIN}")
        if tensors.shape(key) != shape:
            raise UserError(
                f"{origin}: {name} has the shape {tensors.shape(key)} where {shape} is wanted by config.json"
            )
        found[name] = key
    # In the order of the files, so that each is open once.
    order = {key: number for number, key in enumerate(tensors)}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def _embedding_names(model: Any) -> set[str]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is one for one in layers)}


def _rows_of_embeddings(tensors: Tensors, model: Any) -> int | None:
    layer = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is layer)
    return tensors.shape(name)[0] if name in tensors else None


def _copied(tensors: Tensors, key: str, name: str, dtype: torch.dtype | None) -> Made:
    kind = _type(tensors.dtype(key), dtype)
    return Made(name, tensors.shape(key), kind, lambda: converted(tensors.read(key), kind, name))


def _type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own in FLOATS else own
