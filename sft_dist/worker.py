"""What one process of a run does, from the recipe to the trained and measured model."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size

from sft_dist import builtin_models, trackers
from sft_dist.backend import Backend, settle
from sft_dist.checkpoints.keeper import Held, Keeper, refuse_other_batches
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.prepare import TrainingRows, summed
from sft_dist.data.rows import Prepared
from sft_dist.data.template import ChatTemplate, load_template, stop_token_ids
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.evaluation.examination import BeforeTraining, Examination, report
from sft_dist.identity import recipe_hash
from sft_dist.loading import load_trained_model
from sft_dist.metrics import PlainLines, ProgressBar, count_weights
from sft_dist.metrics_file import rewind_metrics
from sft_dist.models import has_dropout, load_config, row_length, use_bf16
from sft_dist.render.wording import count
from sft_dist.rundir import RunDir, claim, versions
from sft_dist.runlock import RunLock
from sft_dist.saving import save_adapter, save_sharded
from sft_dist.stopping import StopRequests
from sft_dist.survival import Survival
from sft_dist.trainers.guard import Guard
from sft_dist.trainers.sft import SFTTrainer, World, sft_config
from sft_dist.trainers.watchdog import Watchdog
from sft_dist.training_data import Say, arrange, arrange_stream, data_lines, prepared_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(recipe: Recipe, recipe_file: Path, command: Sequence[str]) -> None:
    """Train by a recipe, in this process, as one of the processes that the environment tells of.

    Raises :class:`UserError` for what the user can mend.
    """
    with ExitStack() as ending:
        requests = ending.enter_context(StopRequests(recipe.checkpoint.signals, recipe.checkpoint.grace))
        _run(recipe, recipe_file, command, requests, ending)


def _run(recipe: Recipe, recipe_file: Path, command: Sequence[str], requests: StopRequests, ending: ExitStack) -> None:
    began = time.perf_counter()
    world = World.from_environment()
    say = print if world.is_main else _silent
    run_dir = RunDir(Path(recipe.output.output_dir))
    # A recipe that lies in the run's own folder was put there by the launcher, which has claimed it.
    if world.is_main and recipe_file.resolve() != run_dir.recipe.resolve():
        ending.enter_context(RunLock(run_dir.root))
        claim(recipe, command)
    trackers.prepare(recipe, run_dir, world.is_main)
    backend = settle(recipe)
    path = builtin_models.resolve(recipe.model.model_name_or_path)
    tokenizer = load_tokenizer(path, recipe.model, say)
    config = load_config(path, recipe.model)
    limit = row_length(config, recipe.train.max_length)
    template = load_template(tokenizer, recipe.data)
    train, held_out = prepared_rows(recipe, template, limit)
    if world.is_main:
        print(*data_lines(train, held_out, template), sep="\n")
    trainer = _trainer(recipe, run_dir, world, path, tokenizer, train, held_out, backend, say)
    data = Data(template, train, held_out, limit)
    examination, account = _train(recipe, run_dir, world, trainer, data, requests, say)
    _save(trainer, run_dir, world, recipe.model.dtype)
    trainer.survival.end_training()
    after = examination.take("after") if recipe.eval.enabled else None
    if world.is_main:
        report(recipe, run_dir, examination, account, after, time.perf_counter() - began)


@dataclass(frozen=True)
class Data:
    """What a run is trained and measured on. `limit`: tokens of the longest row."""

    template: ChatTemplate
    train: TrainingRows
    held_out: Prepared | None
    limit: int | None


def _train(
    recipe: Recipe, run: RunDir, world: World, trainer: SFTTrainer, data: Data, requests: StopRequests, say: Say
) -> tuple[Examination, Account]:
    """Train, from the newest checkpoint if there is one; what the model is measured by, and the account of the rows."""
    keeper = Keeper(run.checkpoints, recipe.checkpoint, world.local_rank, say)
    held = _held(recipe, keeper, say)
    if world.is_main:
        _log(trainer, recipe, run, held)
    with ExitStack() as ending:
        if recipe.data.streaming:
            stream = arrange_stream(trainer, recipe, data.limit, world, held.path if held else None, ending, say)
        else:
            arrange(trainer, recipe, data.train, data.limit, say)
        trainer.model.generation_config.eos_token_id = stop_token_ids(data.template)
        say(plan_line(trainer))
        examination = Examination(trainer, recipe, data.template, data.held_out, data.limit, say)
        # In this order: the bar begins when what comes before the first step is over.
        trainer.add_callback(BeforeTraining(examination, run))
        trainer.add_callback(PlainLines() if trainer.args.disable_tqdm else ProgressBar())
        if held is not None:
            refuse_other_batches(held, trainer.rows_per_step, trainer.data_digest)
            say(_going_on(held, trainer))
        survival = _survival(recipe, run, world, trainer, keeper, requests, say)
        trainer.survive(survival, held)
        ending.callback(survival.watchdog.stop)
        try:
            trainer.train(resume_from_checkpoint=str(held.path) if held else None)
        except RuntimeError as error:
            refuse_if_too_large(error, trainer.state.global_step - (held.manifest.step if held else 0))
            raise
        survival.end_steps()
        return examination, summed(stream.accounts()) if recipe.data.streaming else data.train.account


def refuse_if_too_large(error: RuntimeError, steps: int) -> None:
    """Raise :class:`UserError` where memory ran out before the first step was done: it would at every start."""
    if steps or not should_reduce_batch_size(error):
        return
    said = " ".join(str(error).split())[:200]
    raise UserError(
        f"train.per_device_train_batch_size: out of memory in the first step ({said}); lower it "
        "(parallel.global_batch_size keeps the rows per step), set train.gradient_checkpointing=true, or take a "
        "parallel.strategy that shards more, such as zero3"
    ) from error


def _silent(_: str) -> None:
    return None


def plan_line(trainer: SFTTrainer) -> str:
    """What the training will be, in a line for people."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    alone = trainer.backend.kind == "plain" and args.world_size == 1
    where = "one process" if alone else f"{trainer.backend.title} on {_processes(args.world_size)}"
    trained, frozen = count_weights(trainer.model)
    weights = f"{(trained + frozen) / 1e6:,.1f} M weights" + (f", {trained / 1e6:,.1f} M trained" if frozen else "")
    steps = f"micro-batches of {args.per_device_train_batch_size}, {args.gradient_accumulation_steps} accumulated"
    length = count(args.max_steps, "step") if args.max_steps > 0 else _epochs(args.num_train_epochs)
    return f"training: {where}, {'bf16' if args.bf16 else 'fp32'}, {weights}, {length} of {rows} rows ({steps})"


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"{number} processes"


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:g} epochs"


def _trainer(recipe: Recipe, run: RunDir, world: World, path: str, tokenizer: PreTrainedTokenizerBase,
             train: Prepared, held_out: Prepared | None, backend: Backend, say: Say) -> SFTTrainer:  # fmt: skip
    from transformers import PrinterCallback, ProgressCallback

    bar = sys.stderr.isatty()
    bf16 = use_bf16(recipe.train.bf16)
    hidden = load_config(path, recipe.model).get_text_config().hidden_size
    # Before the model: they set up the process group, and DeepSpeed for the loading.
    args = sft_config(recipe, run, world, bf16, bar, backend, hidden)
    model = load_trained_model(path, recipe, tokenizer, backend, world, bf16, say)
    rows = held_out.rows if held_out is not None else None
    trainer = SFTTrainer(model, args, train.rows, rows, tokenizer, backend)
    trainer.remove_callback(ProgressCallback if bar else PrinterCallback)
    return trainer


def _log(trainer: SFTTrainer, recipe: Recipe, run: RunDir, held: Held | None) -> None:
    """Have the run logged, from where the checkpoint ended."""
    step = held.manifest.step if held is not None else -1 if recipe.output.resume else None
    if step is not None:
        rewind_metrics(run.metrics, step)
        rewind_metrics(run.events, step)
    for callback in trackers.callbacks(recipe, run, step):
        trainer.add_callback(callback)


def _held(recipe: Recipe, keeper: Keeper, say: Say) -> Held | None:
    """The checkpoint to go on from, or None to begin."""
    if not recipe.output.resume:
        return None
    held = keeper.choose()
    if held is None:
        say(f"{keeper.folder}: no checkpoint yet; from the beginning")
    return held


def _going_on(held: Held, trainer: SFTTrainer) -> str:
    """Where a run goes on, in lines for people."""
    about, world = held.manifest, trainer.args.world_size
    line = f"going on from {held.path}: step {about.step}, {about.tokens:,} tokens"
    if about.world_size != world:
        line += f", written by {_processes(about.world_size)} under {about.strategy}"
        if has_dropout(trainer.model):
            line += f"\ndropout: {_processes(world)} draw other masks than {about.world_size}, by which losses differ"
    return line


def _survival(
    recipe: Recipe, run: RunDir, world: World, trainer: SFTTrainer, keeper: Keeper, requests: StopRequests, say: Say
) -> Survival:
    about = Manifest(
        step=0,
        tokens=0,
        trained_tokens=0,
        world_size=world.size,
        strategy=trainer.backend.name if world.size > 1 or trainer.backend.kind != "plain" else "single",
        rows_per_step=trainer.rows_per_step,
        recipe_hash=recipe_hash(recipe),
        data=trainer.data_digest,
        versions=versions(),
    )
    watchdog = Watchdog(recipe.guard, run.logs / f"stacks-rank{world.rank}.txt", world.rank)
    return Survival(keeper, requests, Guard(recipe.guard), watchdog, about, run.events, say,
                    can_save=recipe.parallel.offload_nvme_path is None)  # fmt: skip


def _save(trainer: SFTTrainer, run: RunDir, world: World, dtype: str) -> None:
    """Write the model under another name and give it its own when it is whole."""
    unfinished = run.model.with_name("model.unfinished")
    if world.is_main:
        # Of a start that was killed here, under a strategy with other names of files.
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    # DeepSpeed trains fp32 copies of weights in bf16, which lie in several processes even where weights do not.
    if trainer.backend.kind != "plain":
        _save_spread(trainer, unfinished, world, dtype)
    else:
        trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if world.is_main:
        # A pickle of the trainer's arguments; the resolved recipe tells the same and more.
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(run.model, ignore_errors=True)
        os.replace(unfinished, run.model)
    trainer.accelerator.wait_for_everyone()


def _save_spread(trainer: SFTTrainer, folder: Path, world: World, dtype: str) -> None:
    model = trainer.model
    if hasattr(model, "peft_config"):
        save_adapter(model, folder)
    else:
        save_sharded(model, folder, getattr(torch, dtype))
        if world.is_main:
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
    if world.is_main:
        trainer.processing_class.save_pretrained(folder)
