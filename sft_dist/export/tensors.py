"""Tensors that are read one at a time, wherever they lie; and the plainest place of all, safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from sft_dist.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COPY_AGAIN = "copy the file again, or take another checkpoint"


class Tensors(Protocol):
    """Named tensors whose sizes are known before they are read."""

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they are best read."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU. Raises :class:`UserError` for damage."""


@dataclass(frozen=True)
class Made:
    """A tensor of the output: name, sizes and type, and how it is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return numel(self.shape) * self.dtype.itemsize


def numel(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor of these sizes."""
    count = 1
    for size in shape:
        count *= size
    return count


class StoredTensors:
    """The tensors of safetensors files. One file is open at a time, so that no more of them is in memory."""

    def __init__(self, places: dict[str, Path]) -> None:
        self._places = places
        self._known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._last: tuple[Path, Any] | None = None
        for path in dict.fromkeys(places.values()):
            self._look(path)
        lost = next((name for name in places if name not in self._known), None)
        if lost is not None:
            raise UserError(f"{places[lost]}: the tensor {lost} is missing from the file; {COPY_AGAIN}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._known[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._known[name][1]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, mapped from its file."""
        tensor: torch.Tensor = self._file(self._places[name]).get_tensor(name)
        return tensor

    def _look(self, path: Path) -> None:
        opened = self._file(path)
        for name in opened.keys():  # noqa: SIM118 - a file of tensors is no mapping
            part = opened.get_slice(name)
            kind = DTYPES.get(part.get_dtype())
            if kind is None:
                raise UserError(
                    f"{path}: {name} is of type {part.get_dtype()}, a quantised model; name one with plain weights"
                )
            self._known[name] = (tuple(part.get_shape()), kind)

    def _file(self, path: Path) -> Any:
        if self._last is None or self._last[0] != path:
            self._last = None
            try:
                self._last = (path, safe_open(path, framework="pt"))
            except FileNotFoundError as error:
                raise UserError(f"{path}: the file is missing; {COPY_AGAIN}") from error
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: truncated or damaged ({error}); {COPY_AGAIN}") from error
        return self._last[1]


def stored(folder: Path, name: str = "model") -> StoredTensors:
    """The tensors of a model directory (`name`: model) or an adapter's (adapter_model). Raises :class:`UserError`."""
    index = folder / f"{name}.safetensors.index.json"
    if not index.exists():
        one = folder / f"{name}.safetensors"
        if not one.exists():
            old = any(folder.glob("*.bin"))
            mend = "save it as safetensors first, pickles are not read" if old else "name a folder that has weights"
            raise UserError(f"{folder}: no {name}.safetensors; {mend}")
        return StoredTensors(dict.fromkeys(_names(one), one))
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = next((file for file in places.values() if Path(file).name != file), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of tensors; {COPY_AGAIN}") from error
    if outside is not None:
        raise UserError(f"{index}: names a file outside its folder, {outside}; take the model from its source")
    return StoredTensors({tensor: folder / file for tensor, file in places.items()})


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); {COPY_AGAIN}") from error


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another type. Raises :class:`UserError` where numbers would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    other = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(torch.isinf(other), torch.isinf(tensor)):
        raise UserError(f"--dtype float16: {name} has numbers beyond its range; use bfloat16 or float32")
    return other
