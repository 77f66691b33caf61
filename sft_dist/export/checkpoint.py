"""The weights in a run's checkpoint, each put together from the stretches that the ranks have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.keeper import COMMON
from sft_dist.checkpoints.pieces import WEIGHT, Reader
from sft_dist.errors import UserError
from sft_dist.export.locate import read_json
from sft_dist.export.tensors import COPY_AGAIN, Tensors, numel

_OTHER = "take another checkpoint"
# Of files, which stay in memory as they are read until they are opened anew.
_MOST_BYTES = 32 * 10**6
# In the names of PPO's weights: the beginning of the policy's, and the value's adapter (sft_dist/ppo/actors.py).
_POLICY, _VALUE = "policy.", ".value."


class CheckpointTensors:
    """The trained weights of a checkpoint, in the type that the optimizer steps; tied ones have one name."""

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._files = files
        self._shapes = shapes
        self._reader = Reader(files)
        self._read = 0
        self._names = [name for name in self._reader.names() if name in shapes]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._reader.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, copied together from its stretches."""
        count = numel(self._shapes[name])
        if self._read > _MOST_BYTES:
            self._reader, self._read = Reader(self._files), 0
        whole = self._reader.read(name, WEIGHT, 0, count).reshape(self._shapes[name])
        self._read += whole.nbytes
        return whole

    def lacking(self) -> str | None:
        """A weight that the files do not hold as a whole."""
        held = set(self._names)
        for name, shape in self._shapes.items():
            if name not in held or self._reader.size(name, WEIGHT) != numel(shape):
                return name
        return None


class PolicyTensors:
    """The policy's of a PPO checkpoint, by the names that they have in a model alone."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._names = {
            name.removeprefix(_POLICY): name for name in tensors if name.startswith(_POLICY) and _VALUE not in name
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._tensors.dtype(self._names[name])

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._tensors.read(self._names[name])


def checkpoint_tensors(checkpoint: Path) -> Tensors:
    """The weights of a checkpoint, once every byte of it was found to be sound; of PPO those of the policy.

    Raises :class:`UserError`.
    """
    if (fault := folders.fault_of(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: {fault}; {_OTHER}")
    files = _files(checkpoint)
    shapes = {name: tuple(sizes) for name, sizes in read_json(checkpoint / COMMON)["shapes"].items()}
    tensors = CheckpointTensors(files, shapes)
    if (lacking := tensors.lacking()) is not None:
        raise UserError(f"{checkpoint}: {lacking} is not whole in its files; {COPY_AGAIN}")
    return PolicyTensors(tensors) if any(name.startswith(_POLICY) for name in tensors) else tensors


def _files(checkpoint: Path) -> list[Path]:
    """The ranks' files. Those of other nodes, which this node's manifest does not know, have to lie beside its own."""
    about = manifest.read(checkpoint)
    names = [f"rank-{rank:05d}.safetensors" for rank in range(about.world_size)]
    lost = next((name for name in names if not (checkpoint / name).is_file()), None)
    if lost is not None:
        raise UserError(
            f"{checkpoint / lost}: the file is missing, the checkpoint lies on {about.nodes} nodes; gather the files "
            "of all nodes in one folder"
        )
    return [checkpoint / name for name in names]
