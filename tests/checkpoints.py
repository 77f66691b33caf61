"""Checkpoints of runs that never were, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.files import Flat, write_bytes, write_tensors
from sft_dist.checkpoints.keeper import COMMON
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.checkpoints.pieces import WEIGHT, Piece, dealt
from tests.recipes import write_recipe

ABOUT = Manifest(step=0, tokens=2_000_000, trained_tokens=1_234_567, world_size=2, strategy="ddp", rows_per_step=4,
                 recipe_hash="", data="")  # fmt: skip


def write_run(root: Path, model: str = "gpt2", **sections: Any) -> Path:
    """A run's folder with nothing but its recipe and a folder for checkpoints."""
    (root / "checkpoints").mkdir(parents=True)
    base: dict[str, Any] = {"model": {"model_name_or_path": model}, "data": {"dataset_name": "python-docs"},
                            "output": {"output_dir": str(root)}}  # fmt: skip
    write_recipe(root / "recipe.yaml", **{**base, **sections})
    return root


def write_checkpoint(run: Path, step: int, weights: Mapping[str, torch.Tensor] | None = None, **about: Any) -> Path:
    """A complete checkpoint of weights, dealt out to `world_size` ranks; with states of an optimizer beside them."""
    weights = {"w": torch.arange(24.0).reshape(4, 6)} if weights is None else weights
    described = replace(ABOUT, step=step, **about)
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    every = [
        Piece(name, kind, 0, tensor.reshape(-1)) for name, tensor in weights.items() for kind in (WEIGHT, "exp_avg")
    ]
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    files = {COMMON: write_bytes(folder / COMMON, json.dumps({"shapes": shapes}).encode())}
    for rank in range(described.world_size):
        name = f"rank-{rank:05d}.safetensors"
        files[name] = write_tensors(folder / name, [_flat(p) for p in dealt(every, rank, described.world_size)])
    (folder / manifest.NAME).write_text(replace(described, files=files).to_json())
    return folder


def turn_a_bit(file: Path) -> None:
    """Damage a file so that its size stays what it was."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _flat(piece: Piece) -> Flat:
    held = piece.tensor.contiguous()
    return Flat(piece.key, piece.dtype, held.numel(), memoryview(held.view(torch.uint8).numpy().data))
