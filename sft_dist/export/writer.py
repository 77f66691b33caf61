"""Writing safetensors tensor by tensor: what is written never lies in memory as a whole, not even one file of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from sft_dist.errors import UserError
from sft_dist.export.tensors import DTYPES, Made
from sft_dist.tensor_files import dealt_out, names_of_files, write_index

_TYPE_NAMES = {kind: name for name, kind in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
# Of the header, the tokenizer and what else is no weight.
_SPARE_BYTES = 32 * 10**6


def size_of(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MiB`. Raises :class:`UserError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"--max-shard-size: {text} is no size; write it like 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def check_space(tensors: Sequence[Made], folder: Path) -> None:
    """Raises :class:`UserError` where the disk of a folder has no room for the tensors."""
    needed, free = sum(t.bytes for t in tensors) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--output: {folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed; "
            "free some, name another folder or a smaller --dtype"
        )


def write(tensors: Sequence[Made], folder: Path, limit: int, stem: str = "model") -> int:
    """Write the tensors in their order, in files of at most `limit` bytes unless one tensor has more.

    Writes an index where there are several files, and returns their number.
    """
    files = dealt_out(tensors, limit)
    names = names_of_files(len(files), stem)
    for name, content in zip(names, files, strict=True):
        _write_file(folder / name, content)
    if len(files) > 1:
        places = {tensor.name: name for name, content in zip(names, files, strict=True) for tensor in content}
        write_index(folder, places, sum(t.bytes for t in tensors), stem)
    return len(files)


def _write_file(path: Path, tensors: Sequence[Made]) -> None:
    """One file: the length of the header in 8 bytes, the header as JSON, and the numbers one after another."""
    # Wide types in front keep every tensor aligned.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        place = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(_numbers(tensor))
        file.flush()
        os.fsync(file.fileno())


def _numbers(tensor: Made) -> memoryview:
    made = tensor.make()
    if tuple(made.shape) != tensor.shape or made.dtype != tensor.dtype:
        raise RuntimeError(f"{tensor.name}: {made.dtype} {tuple(made.shape)} made, not as announced")
    flat = made.detach().contiguous().reshape(-1)
    numbers: memoryview = flat.view(torch.uint8).numpy().data
    return numbers
