"""A model's safetensors: read tensor by tensor and row by row, and how tensors are dealt out to files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a model directory by name. Rows are read from the disk without the rest of the tensor."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: Any = cache(lambda path: safe_open(path, framework="pt"))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension; a tensor without dimensions is its own one row."""
        if not self.shape(name):
            whole: torch.Tensor = self._open(self._files[name]).get_tensor(name)
            return whole.reshape(1)[start:stop]
        part: torch.Tensor = self._slice(name)[start:stop]
        return part

    def _slice(self, name: str) -> Any:
        return self._open(self._files[name]).get_slice(name)


def tensor_files(path: str, revision: str) -> TensorFiles | None:
    """The tensors of a model directory or of a hub model, or None where it has no safetensors."""
    index = _file(path, revision, _INDEX)
    if index is None:
        one = _file(path, revision, _ONE)
        if one is None:
            return None
        with safe_open(one, framework="pt") as opened:
            return TensorFiles(dict.fromkeys(opened.keys(), one))
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found = {name: _file(path, revision, name) for name in sorted(set(places.values()))}
    return TensorFiles({name: file for name, place in places.items() if (file := found[place]) is not None})


def _file(path: str, revision: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found is not None else None


def names_in_files(names: Iterable[str], files: TensorFiles, prefix: str) -> dict[str, str] | None:
    """The name in the files of each tensor of a model, or None where one has none.

    `prefix`: of the model without its head, which the files of some models leave out and others put in front of all.
    """
    found: dict[str, str] = {}
    for name in names:
        spellings = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        spelling = next((one for one in spellings if one in files), None)
        if spelling is None:
            return None
        found[name] = spelling
    return found


class Sized(Protocol):
    """A tensor to be written, of a known size."""

    @property
    def bytes(self) -> int:
        """Bytes in the file."""


S = TypeVar("S", bound=Sized)


def dealt_out(tensors: Sequence[S], limit: int) -> list[list[S]]:
    """The tensors in their order, cut into files of at most `limit` bytes unless one tensor has more."""
    files: list[list[S]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return files


def names_of_files(count: int, stem: str = "model") -> list[str]:
    """The names that transformers gives so many files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def write_index(folder: Path, places: Mapping[str, str], size: int, stem: str = "model") -> None:
    """The index of several files. `places`: the file of each tensor; `size`: bytes of all tensors."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(places)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
