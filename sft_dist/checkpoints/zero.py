"""What a process holds of a training's state under DeepSpeed's ZeRO, and how it is put back.

ZeRO-1 and 2 lay the fp32 copies of all weights of a parameter group out flat and give each process a stretch; ZeRO-3
gives each process a stretch of every weight. The optimizer's states are flat as the copies are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from sft_dist.checkpoints.pieces import STEP, WEIGHT, Piece, Reader, fill
from sft_dist.checkpoints.states import (
    Fsdp2States,
    PlainStates,
    States,
    Steps,
    kinds_of,
    number_like,
    refuse_other_shapes,
    trained,
    trial_state,
)
from sft_dist.checkpoints.together import Place
from sft_dist.straight import whole_shape


@dataclass(frozen=True)
class _Own:
    """Where this process's elements of a parameter, from `start` on, lie in a flat fp32 tensor."""

    name: str
    flat: torch.Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `flat`, or of a state that is laid out as it is."""
        return tensor.detach()[self.offset : self.offset + self.count]


class ZeroStates:
    """Of ZeRO-1, 2 and 3, with the optimizer on the GPU or in the memory of the processor."""

    def __init__(self, model: torch.nn.Module, zero: Any) -> None:
        self._parameters = trained(model)
        self._zero = zero
        self._base: torch.optim.Optimizer = zero.optimizer
        self._is_third = hasattr(zero, "fp32_partitioned_groups_flat")

    def pieces(self) -> list[Piece]:
        found = []
        for own in self._owns():
            found.append(Piece(own.name, WEIGHT, own.start, own.of(own.flat)))
            for kind, value in kinds_of(self._base.state.get(own.flat, {})):
                found.append(Piece(own.name, kind, own.start, own.of(value)))
        return found

    def steps(self) -> Steps:
        states = self._base.state
        return {own.name: float(states[own.flat][STEP]) for own in self._owns() if STEP in states.get(own.flat, {})}

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(whole_shape(parameter)) for name, parameter in self._parameters}

    def load(self, reader: Reader, steps: Mapping[str, float]) -> None:
        refuse_other_shapes(self.shapes(), reader)
        self._make_states(reader, steps)
        for own in self._owns():
            fill(own.of(own.flat), reader, own.name, WEIGHT, own.start)
            for kind, value in kinds_of(self._base.state.get(own.flat, {})):
                fill(own.of(value), reader, own.name, kind, own.start)
        self._load_weights(reader)

    def _load_weights(self, reader: Reader) -> None:
        """The weights that the model computes with, of which the flat ones are fp32 copies."""
        if not self._is_third:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for name, parameter in self._parameters:
            part, (start, count) = parameter.ds_tensor, self._part(parameter)
            fill(part.data[:count], reader, name, WEIGHT, start)
        self._zero.checkpoint_event_epilogue()

    def _make_states(self, reader: Reader, steps: Mapping[str, float]) -> None:
        """Give an optimizer that has not stepped the states of one that has, zero so far: padding stays so."""
        names: dict[torch.Tensor, list[str]] = {}
        for own in self._owns():
            names.setdefault(own.flat, []).append(own.name)
        for flat, held in names.items():
            if held[0] not in steps and not reader.kinds(held[0]):
                self._base.state.pop(flat, None)
                continue
            self._base.state[flat] = trial_state(self._base, flat, self._base.param_groups[0])
            if STEP in self._base.state[flat]:
                self._base.state[flat][STEP] = number_like(self._base.state[flat][STEP], steps[held[0]])

    def _owns(self) -> Iterator[_Own]:
        for name, parameter in self._parameters:
            own = self._third(name, parameter) if self._is_third else self._first_or_second(name, parameter)
            if own is not None and own.count:
                yield own

    def _first_or_second(self, name: str, parameter: Any) -> _Own | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        # ZeRO-1 in bf16 has an optimizer of its own, with other names.
        flats = getattr(self._zero, "single_partition_of_fp32_groups", None) or self._zero.fp32_groups_flat_partition
        lies, covers = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Own(name, flats[mapping.param_group_index], lies.start, covers.start, covers.numel)

    def _third(self, name: str, parameter: Any) -> _Own:
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, count = self._part(parameter)
        return _Own(name, self._zero.fp32_partitioned_groups_flat[group], offset, start, count)

    def _part(self, parameter: Any) -> tuple[int, int]:
        """First element of this process's part of a parameter, and how many there are without the filler."""
        each = parameter.ds_tensor.ds_numel
        start = min(self._zero._get_param_partition_rank(parameter) * each, parameter.ds_numel)
        return start, min(each, parameter.ds_numel - start)


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, around one of torch's."""
    return hasattr(optimizer, "_link_all_hp_params")


def states_of(model: torch.nn.Module, optimizer: Any, place: Place) -> States:
    """The states of a prepared model and optimizer, under whatever strategy they are."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if is_zero(inner):
        return ZeroStates(model, inner)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return Fsdp2States(model, inner, place)
    return PlainStates(model, inner, place.index, place.count)
