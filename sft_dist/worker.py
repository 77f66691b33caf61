"""What one process of a run does, from the recipe to the trained and measured model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from transformers import PrinterCallback, ProgressCallback

from sft_dist import builtin_models, trackers
from sft_dist.backend import settle
from sft_dist.checkpoints.keeper import Held, Keeper, refuse_other_batches
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import Recipe
from sft_dist.data.template import load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.evaluation.before import BeforeTraining
from sft_dist.identity import recipe_hash
from sft_dist.metrics import PlainLines, ProgressBar, count_weights
from sft_dist.metrics_file import rewind_metrics
from sft_dist.models import has_dropout, load_config, row_length, use_bf16
from sft_dist.render.wording import count
from sft_dist.rundir import RunDir, claim, versions
from sft_dist.runlock import RunLock
from sft_dist.stages import Setting, Stage, stage_of
from sft_dist.stopping import StopRequests
from sft_dist.survival import Survival
from sft_dist.trainers.guard import Guard
from sft_dist.trainers.ordered import Ordered
from sft_dist.trainers.watchdog import Watchdog
from sft_dist.world import World

Say = Callable[[str], None]


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
    run_dir = RunDir(Path(recipe.output.output_dir))
    # A recipe that lies in the run's own folder was put there by the launcher, which has claimed it.
    if world.is_main and recipe_file.resolve() != run_dir.recipe.resolve():
        ending.enter_context(RunLock(run_dir.root))
        claim(recipe, command)
    trackers.prepare(recipe, run_dir, world.is_main)
    setting = _setting(recipe, run_dir, world)
    stage = stage_of(setting)
    lines = stage.prepare_data()
    if world.is_main:
        print(f"template: {setting.template.origin}", *lines, sep="\n")
    stage.make_trainer()
    stage.trainer.remove_callback(ProgressCallback if setting.bar else PrinterCallback)
    _train(setting, stage, requests)
    stage.save()
    stage.trainer.survival.end_training()
    after = stage.measure("after") if recipe.eval.enabled else None
    if world.is_main:
        stage.report(after, time.perf_counter() - began)


def _setting(recipe: Recipe, run: RunDir, world: World) -> Setting:
    say = print if world.is_main else _silent
    backend = settle(recipe)
    path = builtin_models.resolve(recipe.model.model_name_or_path)
    tokenizer = load_tokenizer(path, recipe.model, say)
    config = load_config(path, recipe.model)
    return Setting(
        recipe=recipe,
        run=run,
        world=world,
        path=path,
        tokenizer=tokenizer,
        config=config,
        template=load_template(tokenizer, recipe.data),
        limit=row_length(config, recipe.train.max_length),
        backend=backend,
        bf16=use_bf16(recipe.train.bf16),
        bar=sys.stderr.isatty(),
        say=say,
    )


def _train(setting: Setting, stage: Stage, requests: StopRequests) -> None:
    """Train, from the newest checkpoint if there is one."""
    recipe, run, world, say, trainer = setting.recipe, setting.run, setting.world, setting.say, stage.trainer
    keeper = Keeper(run.checkpoints, recipe.checkpoint, world.local_rank, say)
    held = _held(recipe, keeper, say)
    if world.is_main:
        _log(trainer, recipe, run, held)
    with ExitStack() as ending:
        stage.arrange(held, ending)
        say(plan_line(trainer))
        # In this order: the bar begins when what comes before the first step is over.
        trainer.add_callback(BeforeTraining(stage, run, recipe.eval.enabled))
        trainer.add_callback(PlainLines() if trainer.args.disable_tqdm else ProgressBar())
        if held is not None:
            refuse_other_batches(held, trainer.rows_per_step, trainer.data_digest)
            say(_going_on(held, trainer))
        survival = _survival(setting, trainer, keeper, requests)
        trainer.survive(survival, held)
        ending.callback(survival.watchdog.stop)
        try:
            trainer.train(resume_from_checkpoint=str(held.path) if held else None)
        except RuntimeError as error:
            refuse_if_too_large(error, trainer.state.global_step - (held.manifest.step if held else 0))
            raise
        survival.end_steps()


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


def plan_line(trainer: Ordered) -> str:
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


def _log(trainer: Ordered, recipe: Recipe, run: RunDir, held: Held | None) -> None:
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


def _going_on(held: Held, trainer: Ordered) -> str:
    """Where a run goes on, in lines for people."""
    about, world = held.manifest, trainer.args.world_size
    line = f"going on from {held.path}: step {about.step}, {about.tokens:,} tokens"
    if about.world_size != world:
        line += f", written by {_processes(about.world_size)} under {about.strategy}"
        if has_dropout(trainer.model):
            line += f"\ndropout: {_processes(world)} draw other masks than {about.world_size}, by which losses differ"
    return line


def _survival(setting: Setting, trainer: Ordered, keeper: Keeper, requests: StopRequests) -> Survival:
    recipe, run, world = setting.recipe, setting.run, setting.world
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
    return Survival(keeper, requests, Guard(recipe.guard), watchdog, about, run.events, setting.say,
                    can_save=recipe.parallel.offload_nvme_path is None)  # fmt: skip
