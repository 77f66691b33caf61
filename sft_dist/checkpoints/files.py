"""Writing a file to the disk with its checksum. Free of torch.

safetensors' own writer computes no checksum and holds Python's lock while it writes: a training could not go on
beside it. The container is simple: the length of a header, the header in JSON, and the tensors' bytes one after
another (https://huggingface.co/docs/safetensors). It is read by the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sft_dist.checkpoints.manifest import File

# Python's lock is given away once a chunk.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Flat:
    """A flat tensor to be written: its key, safetensors' name of its type, its elements and its bytes in memory."""

    key: str
    dtype: str
    count: int
    content: memoryview


def write_tensors(path: Path, tensors: Sequence[Flat]) -> File:
    """Write a safetensors file of flat tensors, through to the disk. Raises OSError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        size = tensor.content.nbytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": [tensor.count], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little") + text, *(tensor.content for tensor in tensors)])


def write_bytes(path: Path, content: bytes) -> File:
    """Write a file of bytes, through to the disk. Raises OSError."""
    return _write(path, [content])


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> File:
    found, count = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                found.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
            count += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return File(count, found.hexdigest())
