"""The recipe's `train` section as the training arguments that a trainer of transformers or TRL takes."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from sft_dist.backend import Backend, Sizes, deepspeed_config
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.rundir import RunDir
from sft_dist.world import World

# Settings of the recipe's `train` section that no configuration takes as they are.
_NOT_PASSED = {"bf16", "gradient_accumulation_steps", "run_name", "report_to"}
Kind = TypeVar("Kind", bound=TrainingArguments)


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Micro-batches per optimizer step. Raises :class:`UserError` when the global batch does not divide."""
    rows = recipe.parallel.global_batch_size
    if rows is None:
        return recipe.train.gradient_accumulation_steps
    at_once = recipe.train.per_device_train_batch_size * processes
    if rows % at_once:
        raise UserError(
            f"parallel.global_batch_size: {rows} rows do not divide over {processes} processes of "
            f"{recipe.train.per_device_train_batch_size} rows; make it a multiple of {at_once}"
        )
    return rows // at_once


def training_arguments(
    kind: type[Kind], recipe: Recipe, run: RunDir, world: World, bf16: bool, bar: bool, backend: Backend, hidden: int,
    **more: Any,
) -> Kind:  # fmt: skip
    """The arguments of one kind of trainer, which has those settings of the section that it knows.

    `bar`: a progress bar instead of plain lines. `hidden`: width of the model, after which DeepSpeed's buckets are
    sized. `more`: what the kind has beside. The process group, and what DeepSpeed has to know before a model is
    loaded, are set up by it. Raises :class:`UserError`.
    """
    given = recipe.train.model_dump(exclude=_NOT_PASSED)
    # FSDP2 recomputes inside of its own hooks (sft_dist/fsdp2.py).
    if given["gradient_checkpointing"] and backend.kind == "fsdp2":
        given |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    if given["gradient_checkpointing"]:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | (
            given["gradient_checkpointing_kwargs"] or {}
        )
    given["lr_scheduler_kwargs"] = given["lr_scheduler_kwargs"] or {}
    accumulation = accumulation_steps(recipe, world.size)
    # `auto` may come to what the recipe's check did not see.
    if recipe.train.torch_compile and backend.kind != "plain":
        raise UserError(f"train.torch_compile: cannot stand with {backend.name} so far; leave it out")
    if backend.kind == "deepspeed":
        sizes = Sizes(accumulation, world.size, world.local_size, hidden)
        given["deepspeed"] = deepspeed_config(backend, recipe, sizes, bf16=bf16, cuda=torch.cuda.is_available())
    known = {field.name for field in dataclasses.fields(kind)}
    common = {
        "output_dir": str(run.checkpoints),
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_accumulation_steps": accumulation,
        # The trainer's own callbacks know nothing of an earlier start (sft_dist/trackers.py).
        "report_to": "none",
        "run_name": recipe.train.run_name or run.root.name,
        "disable_tqdm": not bar,
        # The collator takes what it needs; the trainer would drop the columns it does not know.
        "remove_unused_columns": False,
        # Every parameter is used in every step; looking for others walks the graph once more.
        "ddp_find_unused_parameters": False,
        "eval_do_concat_batches": True,
    }
    found: Kind = kind(**common, **{name: value for name, value in given.items() if name in known}, **more)
    return found
