"""The state of a training as flat stretches of named tensors: how they are called in files, and how they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft_dist.errors import UserError

WEIGHT = "weight"
# Of the optimizer's states, one number a tensor instead of one an element.
STEP = "step"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
           torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
           torch.bool: "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Elements `start` and following of a tensor laid out flat: the state `kind` of the parameter `name`.

    `tensor`: the elements, (count,), a view of what the training changes.
    """

    name: str
    kind: str
    start: int
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.kind}@{self.start}@{self.name}"

    @property
    def dtype(self) -> str:
        """safetensors' name of the type."""
        return _DTYPES[self.tensor.dtype]


def dealt(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """This rank's share of pieces that all ranks hold alike: an equal part of all bytes, cut where it falls."""
    whole = sum(piece.tensor.nbytes for piece in pieces)
    first, last = whole * rank // world, whole * (rank + 1) // world
    mine, at = [], 0
    for piece in pieces:
        size = piece.tensor.element_size()
        # Elements whose first byte lies in this rank's part.
        start = min(max(-(-(first - at) // size), 0), piece.tensor.numel())
        stop = min(max(-(-(last - at) // size), 0), piece.tensor.numel())
        if start < stop:
            mine.append(Piece(piece.name, piece.kind, piece.start + start, piece.tensor[start:stop]))
        at += piece.tensor.nbytes
    return mine


@dataclass(frozen=True)
class _Stretch:
    start: int
    stop: int
    file: Path
    key: str


class Reader:
    """The tensors of a checkpoint, read by stretches out of whatever files hold them.

    `shapes`: sizes of each whole weight, to be compared with a model's. On a node without a file system that it shares
    with the others, files hold only what its own processes need.
    """

    def __init__(self, files: Iterable[Path], shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        self.shapes = shapes or {}
        self._stretches: dict[tuple[str, str], list[_Stretch]] = defaultdict(list)
        self._open: Any = cache(_opened)
        for file in files:
            held = self._open(file)
            for key in held.keys():  # noqa: SIM118
                kind, start, name = key.split("@", 2)
                stop = int(start) + held.get_slice(key).get_shape()[0]
                self._stretches[name, kind].append(_Stretch(int(start), stop, file, key))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda each: each.start)

    def __contains__(self, name: str) -> bool:
        return (name, WEIGHT) in self._stretches

    def names(self) -> Iterator[str]:
        """The parameters of whose weights something is there."""
        return (name for name, kind in self._stretches if kind == WEIGHT)

    def size(self, name: str, kind: str) -> int:
        """Elements of a tensor."""
        return self._stretches[name, kind][-1].stop

    def kinds(self, name: str) -> list[str]:
        """The optimizer's states of a parameter."""
        return [kind for other, kind in self._stretches if other == name and kind != WEIGHT]

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Type of a tensor's numbers."""
        first = self._stretches[name, kind][0]
        return next(
            kind for kind, code in _DTYPES.items() if code == self._open(first.file).get_slice(first.key).get_dtype()
        )

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to before `stop` of a tensor, flat. Raises :class:`UserError` where some are in no file."""
        parts, at = [], start
        for stretch in self._stretches[name, kind]:
            if stretch.start <= at < min(stretch.stop, stop):
                end = min(stretch.stop, stop)
                part = self._open(stretch.file).get_slice(stretch.key)[at - stretch.start : end - stretch.start]
                parts.append(part)
                at = end
        if at < stop:
            folder = self._stretches[name, kind][0].file.parent
            raise UserError(
                f"{folder}: elements {at:,} to {stop:,} of {name} ({kind}) are not in its files; gather the files of "
                "all nodes in one folder"
            )
        if not parts:
            return torch.empty(0, dtype=self.dtype(name, kind))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}; take another checkpoint") from error


def fill(target: torch.Tensor, reader: Reader, name: str, kind: str, start: int) -> None:
    """Fill a tensor with the elements from `start` on, in row-major order, whatever its sizes and type."""
    count = target.numel()
    if count:
        with torch.no_grad():
            target.copy_(reader.read(name, kind, start, start + count).reshape(target.shape))
