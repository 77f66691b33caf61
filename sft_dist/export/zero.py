"""The weights in a DeepSpeed checkpoint of ZeRO-1, 2 or 3, each put together from the files of all ranks.

The fp32 copies that the optimizer steps lie in one flat stretch a rank. Under ZeRO-1 and 2 the ranks' stretches follow
each other and the weights lie in the whole one after another; under ZeRO-3 every weight is cut into as many equal
parts as there are ranks, the last one filled up, and each rank's stretch has its parts of all weights in order.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sft_dist.errors import UserError
from sft_dist.export.tensors import COPY_AGAIN, numel

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_OTHER = "this version of DeepSpeed writes it in another way; use the zero_to_fp32.py beside it"


class _Ignored:
    """Stands for an object of DeepSpeed's that is of no use here, so that its own code is not run."""

    def __new__(cls, *_: object) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        return None


class _Stage(int):
    """Stands for DeepSpeed's enumeration of stages."""


_STAND_INS: list[Any] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class ZeroTensors:
    """The trained and frozen weights of a checkpoint, in fp32 as the optimizer has them; files are mapped."""

    def __init__(self, parts: dict[str, list[torch.Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
        self._parts = parts
        self._shapes = shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._parts[name][0].dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, copied together from the ranks' parts."""
        count = numel(self._shapes[name])
        whole = torch.empty(count, dtype=self.dtype(name))
        at = 0
        for part in self._parts[name]:
            taken = min(part.numel(), count - at)
            whole[at : at + taken].copy_(part.reshape(-1)[:taken])
            at += taken
        return whole.reshape(self._shapes[name])


def zero_tensors(checkpoint: Path) -> ZeroTensors:
    """The weights of a Trainer's checkpoint that has `latest` and `global_stepN/`. Raises :class:`UserError`."""
    folder = _newest(checkpoint)
    optimizers = [_load(path)["optimizer_state_dict"] for path in _optimizer_files(folder)]
    try:
        stage, world = int(optimizers[0]["zero_stage"]), optimizers[0]["partition_count"]
        world = max(world) if isinstance(world, list) else int(world)
        if world != len(optimizers):
            raise _absent(folder, f"the optim_states.pt of rank {len(optimizers)}", world)
        models = _model_states(folder, stage, world)
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in models[0]["param_shapes"]]
        cut = _cut_by_rank if stage == 3 else _cut_through
        parts = cut(folder, shapes, optimizers)
        known = {name: shape for group in shapes for name, shape in group.items()}
        _add_others(folder, models, parts, known, whole=stage < 3)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not as expected ({type(error).__name__}: {error}); {_OTHER}") from error
    return ZeroTensors(parts, known)


def _newest(checkpoint: Path) -> Path:
    latest = checkpoint / "latest"
    if not latest.is_file():
        raise UserError(f"{latest}: the file is missing, the checkpoint was not finished; take another checkpoint")
    tag = latest.read_text(encoding="utf-8").strip()
    folder = checkpoint / tag
    if not tag or Path(tag).name != tag or not folder.is_dir():
        raise UserError(f"{folder}: the folder that {latest.name} names is missing; take another checkpoint")
    return folder


def _optimizer_files(folder: Path) -> list[Path]:
    found = {int(m[1]): path for path in folder.iterdir() if (m := _OPTIMIZER.fullmatch(path.name))}
    if not found:
        raise UserError(f"{folder}: no *_optim_states.pt; {COPY_AGAIN}")
    gap = next((rank for rank in range(max(found)) if rank not in found), None)
    if gap is not None:
        raise _absent(folder, f"zero_pp_rank_{gap}_mp_rank_00_optim_states.pt", max(found) + 1)
    return [found[rank] for rank in sorted(found)]


def _absent(folder: Path, what: str, world: int) -> UserError:
    return UserError(
        f"{folder}: {what} is missing, the run had {world} processes; gather the files of all nodes in one folder"
    )


def _model_states(folder: Path, stage: int, world: int) -> list[Any]:
    if stage < 3:
        names = ["mp_rank_00_model_states.pt"]
    else:
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    for name in names:
        if not (folder / name).exists():
            raise _absent(folder, name, world)
    return [_load(folder / name) for name in names]


def _load(path: Path) -> Any:
    """A file's content, its tensors mapped; nothing in it is run."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        line = " ".join(str(error).split())
        found = re.search(r"(?:GLOBAL|class|global) `?([\w.]+)", line)
        what = found[1] if found else line[:120]
        raise UserError(f"{path}: holds {what}, which is not needed for weights and so not read; {_OTHER}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged ({str(error).splitlines()[0][:120]}); {COPY_AGAIN}") from error


def _cut_through(folder: Path, groups: Sequence[dict[str, tuple[int, ...]]],
                 optimizers: Sequence[Any]) -> dict[str, list[torch.Tensor]]:  # fmt: skip
    """ZeRO-1 and 2: the parts of each weight in the ranks' stretches laid end to end."""
    parts: dict[str, list[torch.Tensor]] = {}
    padding = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        stretches = [each["single_partition_of_fp32_groups"][number].detach() for each in optimizers]
        at = 0
        for index, (name, shape) in enumerate(shapes.items()):
            parts[name] = _between(stretches, at, at + numel(shape))
            at += numel(shape) + (int(padding[number][index]) if padding else 0)
        have, align = sum(s.numel() for s in stretches), 2 * len(optimizers)
        # The end is filled up to a multiple of twice the number of ranks.
        if -(-at // align) != -(-have // align):
            raise UserError(f"{folder}: {have} numbers for weights of {at}; {_OTHER}")
    return parts


def _cut_by_rank(folder: Path, groups: Sequence[dict[str, tuple[int, ...]]],
                 optimizers: Sequence[Any]) -> dict[str, list[torch.Tensor]]:  # fmt: skip
    """ZeRO-3: of each weight the same piece of every rank's own stretches."""
    parts: dict[str, list[torch.Tensor]] = {}
    stretches = [[flat.detach() for flat in each["fp32_flat_groups"]] for each in optimizers]
    at = 0
    for name, shape in (item for group in groups for item in group.items()):
        size = -(-numel(shape) // len(optimizers))
        parts[name] = [piece for own in stretches for piece in _between(own, at, at + size)]
        at += size
    for rank, own in enumerate(stretches):
        if (have := sum(flat.numel() for flat in own)) != at:
            raise UserError(f"{folder}: rank {rank} has {have} numbers for parts of {at}; {_OTHER}")
    return parts


def _between(stretches: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Numbers `start` to `stop` of flat tensors laid end to end, as views of them."""
    found = []
    before = 0
    for flat in stretches:
        first, last = max(start - before, 0), min(stop - before, flat.numel())
        if first < last:
            found.append(flat[first:last])
        before += flat.numel()
    return found or [stretches[0][:0]]


def _add_others(folder: Path, models: Sequence[Any], parts: dict[str, list[torch.Tensor]],
                shapes: dict[str, tuple[int, ...]], whole: bool) -> None:  # fmt: skip
    """Buffers, frozen weights and second names of shared ones. `whole`: the model's own weights are not in parts."""
    first = models[0]
    for name in first["buffer_names"]:
        if (buffer := first["module"].get(name)) is not None:
            parts[name], shapes[name] = [buffer], tuple(buffer.shape)
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts[name], shapes[name] = [each["frozen_param_fragments"][name].detach() for each in models], tuple(shape)
    shared = first["shared_params"]
    # ZeRO-1 says nothing of frozen weights; below ZeRO-3 they lie whole among the model's own.
    for name, tensor in (first["module"] if whole else {}).items():
        if name not in parts and name not in shared and isinstance(tensor, torch.Tensor):
            parts[name], shapes[name] = [tensor.detach()], tuple(tensor.shape)
    for name in shapes:
        if sum(part.numel() for part in parts[name]) < numel(shapes[name]):
            raise UserError(f"{folder}: a part of {name} is missing; {COPY_AGAIN}")
    for alias, name in shared.items():
        if name in parts:
            parts[alias], shapes[alias] = parts[name], shapes[name]
