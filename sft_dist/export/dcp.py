"""The weights in a checkpoint of torch.distributed.checkpoint, as FSDP2 writes it, without a process group."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from sft_dist.errors import UserError
from sft_dist.export.tensors import COPY_AGAIN, numel

_METADATA = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in _METADATA},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # Where the checkpoint was written, as a path that cannot touch a disk.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _Reader(pickle.Unpickler):
    """Reads a pickle in which there is nothing but torch's description of a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of the description, or a refusal of anything else."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"{module}.{name}")


class DistributedTensors:
    """The tensors of a checkpoint under one of its first names (`model.`), each from the pieces of all ranks."""

    def __init__(self, folder: Path, described: metadata.Metadata, prefix: str) -> None:
        self._folder = folder
        self._storage: dict[Any, Any] = described.storage_data
        self._found = {
            name.removeprefix(prefix): (name, entry)
            for name, entry in described.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
        }
        for name in self._found:
            self._check(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self._found[name][1].size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        kind: torch.dtype = self._found[name][1].properties.dtype
        return kind

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from its pieces."""
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for chunk in self._found[name][1].chunks:
            place = whole
            for dimension, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(dimension, start, size)
            piece = self._piece(name, chunk)
            if piece.shape != place.shape:
                raise UserError(f"{self._file(name, chunk)}: a piece of {name} has a wrong shape; {COPY_AGAIN}")
            place.copy_(piece)
        return whole

    def _info(self, name: str, chunk: Any) -> Any:
        return self._storage[metadata.MetadataIndex(self._found[name][0], chunk.offsets)]

    def _file(self, name: str, chunk: Any) -> Path:
        return self._folder / str(self._info(name, chunk).relative_path)

    def _check(self, name: str) -> None:
        """Every piece of a tensor is in a file that is long enough, and together they are the whole."""
        chunks = self._found[name][1].chunks
        if sum(numel(tuple(chunk.sizes)) for chunk in chunks) != numel(self.shape(name)):
            raise UserError(f"{self._folder / '.metadata'}: a part of {name} is missing; {COPY_AGAIN}")
        for chunk in chunks:
            info, file = self._info(name, chunk), self._file(name, chunk)
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise UserError(f"{self._folder / '.metadata'}: {name} lies in a form that is not read")
            if not file.is_file():
                raise UserError(f"{file}: the file is missing; gather the files of all nodes in one folder")
            if file.stat().st_size < info.offset + info.length:
                raise UserError(f"{file}: truncated, {name} lies behind its end; {COPY_AGAIN}")

    def _piece(self, name: str, chunk: Any) -> torch.Tensor:
        info, file = self._info(name, chunk), self._file(name, chunk)
        with open(file, "rb") as opened:
            opened.seek(info.offset)
            content = io.BytesIO(opened.read(info.length))
        try:
            piece: torch.Tensor = torch.load(content, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{file}: {name} is damaged; {COPY_AGAIN}") from error
        return piece.detach()


def distributed_tensors(folder: Path) -> DistributedTensors:
    """The model's tensors in a folder such as `pytorch_model_fsdp_0`. Raises :class:`UserError`."""
    file = folder / ".metadata"
    if not file.is_file():
        raise UserError(f"{file}: the file is missing, the checkpoint was not finished; take another checkpoint")
    try:
        with open(file, "rb") as opened:
            described = _Reader(opened).load()
        names = list(described.state_dict_metadata)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: {error} is no part of a checkpoint's description or the file is damaged; {COPY_AGAIN}"
        ) from error
    except (EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); {COPY_AGAIN}") from error
    prefix = "model." if names and all(name.startswith("model.") for name in names) else ""
    try:
        return DistributedTensors(folder, described, prefix)
    except KeyError as error:
        raise UserError(f"{file}: a piece of {error} has no place; {COPY_AGAIN}") from error
