"""Weights from a model's files straight into the shards: no process ever holds, or reads, a whole copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sft_dist import fsdp2
from sft_dist.tensor_files import TensorFiles, names_in_files

# What peft puts into the name of a weight that it wraps.
_WRAPPED = re.compile(r"^base_model\.model\.|(?<=\.)(base_layer|original_module|modules_to_save\.default)\.")


def places(model: Any, files: TensorFiles, optional: Callable[[str], bool] | None = None) -> dict[str, str] | None:
    """The name in the files of each weight of a model, or None where files and model do not fit one to one.

    Such models (renamed, split or fused weights) are read by transformers, which knows how. `optional`: whether the
    files may lack a weight of this name.
    """
    state = own_tensors(model)
    names = [name for name in state if not (optional and optional(name) and name not in files)]
    found = names_in_files(names, files, model.base_model_prefix)
    if found is None or any(whole_shape(state[name]) != files.shape(place) for name, place in found.items()):
        return None
    return found


def own_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by name, those of two names by one: the shards that this process has."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a tensor before DeepSpeed has cut it into shards."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def plain_name(name: str) -> str:
    """A weight's name in the model without an adapter around it."""
    return _WRAPPED.sub("", name)


def fill_fsdp2(parameters: Iterable[tuple[str, DTensor]], files: TensorFiles, place: dict[str, str]) -> None:
    """Read this process's rows of each parameter. Those of an adapter are left alone."""
    for name, parameter in parameters:
        if (source := place.get(plain_name(name))) is not None:
            with torch.no_grad():
                local = parameter.to_local()
                local.copy_(files.rows(source, *fsdp2.own_rows(parameter)).reshape(local.shape))


def fill_zero3(parameters: Iterable[tuple[str, Any]], files: TensorFiles, place: dict[str, str]) -> None:
    """Read this process's part of each parameter, a stretch of it laid out flat, out of the rows around it."""
    import torch.distributed as dist

    rank = dist.get_rank()
    for name, parameter in parameters:
        if (source := place.get(name)) is None:
            continue
        own = parameter.ds_tensor
        start = min(rank * own.ds_numel, parameter.ds_numel)
        stop = min(start + own.ds_numel, parameter.ds_numel)
        width = parameter.ds_numel // (parameter.ds_shape[0] if len(parameter.ds_shape) else 1)
        first, last = start // width, -(-stop // width)
        flat = files.rows(source, first, last).reshape(-1)[start - first * width : stop - first * width]
        with torch.no_grad():
            own.data[: stop - start].copy_(flat)
            # The end of the last part is filler, which stays out of sums and norms as zeros.
            own.data[stop - start :].zero_()


def without_values() -> AbstractContextManager[Any]:
    """Modules made inside have their parameters on the meta device, and their buffers as they should be."""
    from accelerate import init_empty_weights

    context: AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return context


def build(make: Callable[[], Any], where: AbstractContextManager[Any]) -> Any:
    """A model of `make`, its parameters placed by `where` and given no values; tied weights are tied."""
    from transformers.initialization import no_init_weights

    with where, no_init_weights():
        model = make()
    model.tie_weights()
    return model
