"""What of a training's state a process holds under each strategy, and how it is put back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from sft_dist import fsdp2
from sft_dist.checkpoints.pieces import STEP, WEIGHT, Piece, Reader, dealt, fill
from sft_dist.checkpoints.together import Place
from sft_dist.errors import UserError

# The optimizer's counts of steps, by the name of the parameter.
Steps = dict[str, float]


class States(Protocol):
    """The trained tensors and their optimizer states, as one process holds them."""

    def pieces(self) -> list[Piece]:
        """What this process writes; together the processes write every element once."""

    def steps(self) -> Steps:
        """The optimizer's count of steps for each parameter that this process knows of."""

    def load(self, reader: Reader, steps: Mapping[str, float]) -> None:
        """Put back what was written, by any number of processes under any strategy. All ranks call it together."""

    def shapes(self) -> dict[str, list[int]]:
        """Sizes of each whole weight."""


def trained(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The parameters that are trained, by name; tied ones once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def kinds_of(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The states of a parameter that have an element for each of its elements, or nearly so."""
    return ((kind, value) for kind, value in state.items() if isinstance(value, torch.Tensor) and kind != STEP)


def refuse_other_shapes(own: Mapping[str, list[int]], reader: Reader) -> None:
    """Raise :class:`UserError` where a checkpoint is not of these weights."""
    for name, sizes in own.items():
        if name not in reader.shapes:
            raise UserError(
                f"output.resume: the checkpoint has no {name}; resume with the recipe that it was written by"
            )
        if (have := list(reader.shapes[name])) != sizes:
            raise UserError(
                f"output.resume: {name} has the shape {sizes} here and {have} in the checkpoint; "
                "resume with the model that it was written by"
            )
    extra = next((name for name in reader.shapes if name not in own), None)
    if extra is not None:
        raise UserError(
            f"output.resume: the checkpoint has {extra}, which is not trained here; resume with the recipe that it was "
            "written by"
        )


class _ParameterStates:
    """Where the optimizer steps the model's own parameters, whole ones or the rows of them that a process holds."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = trained(model)
        self._optimizer = optimizer

    def _own(self, name: str, parameter: Any) -> list[Piece]:
        """What this process holds of a parameter and its states."""
        start = _first_element(parameter)
        own = [Piece(name, WEIGHT, start, _local(parameter).detach().reshape(-1))]
        for kind, value in kinds_of(self._optimizer.state[parameter]):
            own.append(Piece(name, kind, start, _local(value).reshape(-1)))
        return own

    def steps(self) -> Steps:
        states = self._optimizer.state
        return {name: float(_local(states[p][STEP])) for name, p in self._parameters if STEP in states.get(p, {})}

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._parameters}

    def load(self, reader: Reader, steps: Mapping[str, float]) -> None:
        refuse_other_shapes(self.shapes(), reader)
        _make_states(self._optimizer, self._parameters, reader, steps)
        for name, parameter in self._parameters:
            start = _first_element(parameter)
            fill(_local(parameter).detach(), reader, name, WEIGHT, start)
            for kind, value in kinds_of(self._optimizer.state.get(parameter, {})):
                fill(_local(value), reader, name, kind, start)


class PlainStates(_ParameterStates):
    """Of one process, or of DDP, where all hold the same: dealt out to be written, and each reads the whole.

    `index`: this rank's place among the `count` that write to the same folder.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, index: int, count: int) -> None:
        super().__init__(model, optimizer)
        self._index, self._count = index, count

    def pieces(self) -> list[Piece]:
        every = [piece for name, parameter in self._parameters for piece in self._own(name, parameter)]
        return dealt(every, self._index, self._count)


class Fsdp2States(_ParameterStates):
    """Rows of each tensor; where nodes hold the same rows and write to one folder, each writes a part of them."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> None:
        fsdp2.reshard(model)
        super().__init__(model, optimizer)
        self._place = place

    def pieces(self) -> list[Piece]:
        return [piece for name, parameter in self._parameters for piece in self._written(name, parameter)]

    def _written(self, name: str, parameter: DTensor) -> list[Piece]:
        own, mesh = self._own(name, parameter), parameter.device_mesh
        if mesh.ndim == 1 or len(self._place.leaders) > 1:
            return own
        return dealt(own, mesh.get_local_rank("replicate"), mesh["replicate"].size())


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _first_element(parameter: torch.Tensor) -> int:
    """The place of this process's first element in the whole."""
    if not isinstance(parameter, DTensor):
        return 0
    width = parameter.numel() // max(parameter.shape[0], 1) if parameter.dim() else 1
    return fsdp2.own_rows(parameter)[0] * width


def _make_states(optimizer: Any, parameters: list[tuple[str, Any]], reader: Reader, steps: Mapping[str, float]) -> None:
    """Give an optimizer that has not stepped the states of one that has, of no value yet.

    Their form is found by a step over gradients of zero in a copy of the optimizer that has one parameter at a time:
    each optimizer knows best on which device it counts its steps, and what shape its states have.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters:
        kinds = reader.kinds(name)
        if not kinds and name not in steps:
            optimizer.state.pop(parameter, None)
            continue
        if parameter not in optimizer.state or not optimizer.state[parameter]:
            optimizer.state[parameter] = trial_state(optimizer, parameter, groups[id(parameter)])
        state = optimizer.state[parameter]
        wanted = {kind for kind, _ in kinds_of(state)}
        if wanted != set(kinds):
            raise UserError(
                f"output.resume: the checkpoint has the states {', '.join(sorted(kinds)) or 'none'} of {name}, this "
                f"optimizer {', '.join(sorted(wanted)) or 'none'}; resume with the recipe that it was written by"
            )
        if STEP in state:
            state[STEP] = number_like(state[STEP], steps[name])


def number_like(like: Any, value: float) -> Any:
    """A number in the form that an optimizer has it in."""
    return torch.full_like(like, value) if isinstance(like, torch.Tensor) else type(like)(value)


def trial_state(optimizer: Any, parameter: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """The states that an optimizer has of a parameter after a step over a gradient of zero."""
    copy = parameter.detach().clone().requires_grad_()
    copy.grad = torch.zeros_like(copy)
    taken = inspect.signature(type(optimizer)).parameters
    trial = type(optimizer)([copy], **{key: value for key, value in group.items() if key in taken and key != "params"})
    trial.step()
    return dict(trial.state[copy])
