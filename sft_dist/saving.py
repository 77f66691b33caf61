"""Writing the weights of a model whose shards lie in several processes: file by file, never whole in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from sft_dist.straight import plain_name

# Bytes of a file, and so about what a process holds for it. The hub's tools take files of any number.
FILE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Piece:
    """A tensor that is written: its name in the file and the parameter or buffer that has its shards."""

    name: str
    source: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole tensor."""
        return tuple(getattr(self.source, "ds_shape", self.source.shape))


def save_sharded(model: Any, folder: Path, dtype: torch.dtype, file_bytes: int = FILE_BYTES) -> None:
    """Write a model without an adapter as safetensors; all ranks call it together.

    The files are dealt out to the ranks: each gathers those tensors that it writes, one file at a time.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    files = _files(_pieces(model), dtype, file_bytes)
    name = "model.safetensors" if len(files) == 1 else "model-{:05d}-of-{:05d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    for number, pieces in enumerate(files):
        mine = number % world == rank
        tensors = dict(_gathered(pieces, dtype, mine))
        if mine:
            path = folder / name.format(number + 1, len(files))
            save_file(tensors, path, metadata={"format": "pt"})
    if rank == 0 and len(files) > 1:
        where = {p.name: name.format(n + 1, len(files)) for n, pieces in enumerate(files) for p in pieces}
        size = sum(_bytes(p, dtype) for pieces in files for p in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    dist.barrier()


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a model, which is small: rank 0 gathers it. All ranks call it together."""
    trained = [Piece(name, p) for name, p in model.named_parameters() if p.requires_grad]
    whole = dict(_gathered(trained, torch.float32, dist.get_rank() == 0))
    if dist.get_rank() == 0:
        # What a module trained beside the adapter was made from is frozen, and peft looks for it too.
        model.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
    dist.barrier()


def _pieces(model: Any) -> list[Piece]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = model.state_dict(keep_vars=True)
    return [Piece(plain_name(name), source) for name, source in state.items() if name not in tied]


def _files(pieces: list[Piece], dtype: torch.dtype, limit: int) -> list[list[Piece]]:
    """The pieces in their order, cut so that no file passes the limit, unless one tensor does."""
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + _bytes(piece, dtype) > limit:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += _bytes(piece, dtype)
    return files


def _bytes(piece: Piece, dtype: torch.dtype) -> int:
    count = 1
    for size in piece.shape:
        count *= size
    return count * dtype.itemsize


def _gathered(pieces: list[Piece], dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors where they are kept; elsewhere only this process's part in gathering them."""
    for piece in pieces:
        whole = _whole(piece.source)
        if keep:
            kind = dtype if whole.is_floating_point() else whole.dtype
            yield piece.name, whole.detach().to("cpu", kind, copy=True).contiguous()


def _whole(source: Any) -> torch.Tensor:
    """A tensor out of its shards; of DeepSpeed's fp32 master weights where there are such."""
    if isinstance(source, DTensor):
        full: torch.Tensor = source.full_tensor()
        return full
    # Frozen weights, and those that are not trained yet, have neither. Under ZeRO-1 and 2 the mapping is None where
    # another process updates the weight, and that process takes part all the same.
    if hasattr(source, "_z3_optimizer") or hasattr(source, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master: torch.Tensor | None = safe_get_full_fp32_param(source)
        if master is not None:
            return master
    if hasattr(source, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([source]):
            return torch.clone(source.data)
    plain: torch.Tensor = source
    return plain
