"""Writing the weights of a model whose shards lie in several processes: file by file, never whole in one process."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from sft_dist.straight import own_tensors, plain_name, whole_shape
from sft_dist.tensor_files import dealt_out, names_of_files, write_index

if TYPE_CHECKING:
    from sft_dist.stages import Setting
    from sft_dist.world import World

# Bytes of a file, and so about what a process holds for it. The hub's tools take files of any number.
FILE_BYTES = 2 * 10**9


def save_model(model: Any, setting: Setting) -> None:
    """Write a trained model, or its adapter, under another name and give it its own when it is whole.

    With its tokenizer. All ranks call it together.
    """
    final, world = setting.run.model, setting.world
    unfinished = final.with_name("model.unfinished")
    if world.is_main:
        # Of a start that was killed here, under a strategy with other names of files.
        shutil.rmtree(unfinished, ignore_errors=True)
    _wait(world)
    write_model(model, unfinished, setting)
    if world.is_main:
        setting.tokenizer.save_pretrained(unfinished)
    _wait(world)
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    _wait(world)


def write_model(model: Any, folder: Path, setting: Setting) -> None:
    """Write a model, or its adapter, into a folder as it goes along. All ranks call it together."""
    # DeepSpeed trains fp32 copies of weights in bf16, which lie in several processes even where weights do not.
    if setting.backend.kind == "plain":
        if setting.world.is_main:
            model.save_pretrained(folder)
        return
    if hasattr(model, "peft_config"):
        save_adapter(model, folder)
        return
    save_sharded(model, folder, getattr(torch, setting.recipe.model.dtype))
    if setting.world.is_main:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _wait(world: World) -> None:
    if world.size > 1:
        dist.barrier()


@dataclass(frozen=True)
class Piece:
    """A tensor that is written: its name in the file, what has its shards, and the type it gets there."""

    name: str
    source: Any
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor in the file."""
        return math.prod(whole_shape(self.source)) * self.dtype.itemsize


def save_sharded(model: Any, folder: Path, dtype: torch.dtype, file_bytes: int = FILE_BYTES) -> None:
    """Write a model without an adapter as safetensors; all ranks call it together.

    The files are dealt out to the ranks: each gathers those tensors that it writes, one file at a time.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    pieces = [Piece(plain_name(name), source, dtype) for name, source in own_tensors(model).items()]
    files = dealt_out(pieces, file_bytes)
    names = names_of_files(len(files))
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(zip(names, files, strict=True)):
        mine = number % world == rank
        tensors = dict(_gathered(content, mine))
        if mine:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if rank == 0 and len(files) > 1:
        places = {piece.name: name for name, content in zip(names, files, strict=True) for piece in content}
        write_index(folder, places, sum(piece.bytes for piece in pieces))
    dist.barrier()


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a model, which is small: rank 0 gathers it. All ranks call it together."""
    trained = [Piece(name, p, torch.float32) for name, p in model.named_parameters() if p.requires_grad]
    whole = dict(_gathered(trained, dist.get_rank() == 0))
    if dist.get_rank() == 0:
        # What a module trained beside the adapter was made from is frozen, and peft looks for it too.
        model.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
    dist.barrier()


def _gathered(pieces: list[Piece], keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors where they are kept; elsewhere only this process's part in gathering them."""
    for piece in pieces:
        whole = _whole(piece.source)
        if keep:
            kind = piece.dtype if whole.is_floating_point() else whole.dtype
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
