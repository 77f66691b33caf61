"""What a checkpoint says of itself: every file of it with size and checksum. Free of torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class File:
    """Size of a file in bytes, and the XXH3 checksum of its content (128 bits, hexadecimal)."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: the files of it, and the training at that moment.

    `tokens`, `trained_tokens`: over all ranks, since the beginning. `rows_per_step`: of a global batch. `data`: of the
    rows that are trained on. `metrics`: held-out values that were measured at this step. `nodes`: folders that the
    checkpoint lies in, 1 on a file system that all ranks share.
    """

    step: int
    tokens: int
    trained_tokens: int
    world_size: int
    strategy: str
    rows_per_step: int
    recipe_hash: str
    data: str
    nodes: int = 1
    versions: Mapping[str, str | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> str:
        """The manifest as text that carries its own checksum."""
        held = {"format": FORMAT, **asdict(self)}
        return json.dumps(held | {"xxh3_128": _sum_of(held)}, indent=2) + "\n"


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ValueError, in words, where it is missing or damaged."""
    try:
        held = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{NAME} cannot be read: {error}") from error
    if not isinstance(held, dict) or held.pop("xxh3_128", None) != _sum_of(held):
        raise ValueError(f"{NAME} is damaged: its checksum is another")
    if (version := held.pop("format")) != FORMAT:
        raise ValueError(f"{NAME} has the format {version}; this version of sft-dist reads {FORMAT}")
    files = {name: File(**file) for name, file in held.pop("files").items()}
    return Manifest(**held, files=files)


def size_fault(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files at a glance, or None. Contents are not read."""
    for name, file in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != file.bytes:
            return f"{name} has {found:,} bytes instead of {file.bytes:,}"
    return None


def content_fault(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the content of files (of all, or of those named), or None."""
    for name in manifest.files if names is None else names:
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != manifest.files[name].xxh3_128:
            return f"{name} is damaged: its checksum is another"
    return None


def checksum(path: Path) -> str:
    """The checksum of a file's content, read with as little memory as a chunk."""
    found = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum_of(held: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(held, sort_keys=True).encode()).hexdigest()
