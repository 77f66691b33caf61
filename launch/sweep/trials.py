"""The trials of a sweep as resolved recipes, each with a folder of its own, and what became of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launch.slurm import in_queue
from launch.slurm.queue import Job as Queued
from launch.slurm.records import End, SlurmDir, read_attempts
from launch.slurm.verdict import CANCELLED
from launch.sweep import metric
from launch.sweep.history import Record
from launch.sweep.space import Point, short_names, written
from launch.sweep.study import Study, points
from sft_dist import identity
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from sft_dist.render.sweep import value
from sft_dist.render.wording import count
from sft_dist.rundir import RunDir
from sft_dist.runlock import living

State = Literal["waiting", "queued", "running", "unfinished", "done", "failed"]
# What a run that was killed while it claimed its folder may have left in it.
_CLAIMED = ("environment.json", "logs", "eval", "checkpoints", "slurm")
_COMMAND_LINE = "command line: "


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. `settings`: the varied ones. `recipe`: as it is to be run now, going on where it stopped."""

    settings: Point
    recipe: Recipe
    state: State = "waiting"
    reason: str | None = None
    said: str | None = None
    seconds: float | None = None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output.output_dir)

    @property
    def name(self) -> str:
        return self.folder.name


def resolve(study: Study) -> list[Trial]:
    """The trials, not yet in folders of their own. Raises :class:`UserError` with the faults of all, one a line."""
    trials: list[Trial] = []
    faults: dict[str, list[Point]] = {}
    every = points(study)
    for settings in every:
        try:
            trials.append(Trial(settings, load_recipe(study.recipe, _words(study, settings))))
        except UserError as error:
            for line in str(error).splitlines():
                faults.setdefault(_placed(study, line), []).append(settings)
    if faults:
        raise UserError("\n".join(f"{line}{whose(where, len(every))}" for line, where in faults.items()))
    _refuse_twins(study, trials)
    return trials


def settle(
    study: Study,
    trials: Sequence[Trial],
    records: Mapping[str, Sequence[Record]],
    jobs: Mapping[str, Queued] | None = None,
) -> list[Trial]:
    """The trials in their folders, with what became of them: by their settings, whatever their number.

    `jobs`: what is in Slurm's queue.
    A trial that was never begun gets the first name that is free. Nothing is written.
    """
    keys = tuple(study.parameters)
    held = {_identity(recipe, keys): folder for folder, recipe in _recipes(study.root).items()}
    numbers = iter(range(len(trials) + 100_000))
    settled = []
    for trial in trials:
        folder = held.get(_identity(trial.recipe, keys))
        if folder is None:
            names = (study.root / f"trial-{number:03}" for number in numbers)
            folder = next(path for path in names if _is_free(path))
        settled.append(_became(_in(trial, folder, study), records.get(folder.name, ()), jobs or {}))
    return settled


def strangers(study: Study, trials: Sequence[Trial]) -> list[str]:
    """Folders of runs below the sweep's that are none of its trials."""
    ours = {trial.folder for trial in trials}
    return sorted(path.parent.name for path in study.root.glob("*/recipe.yaml") if path.parent not in ours)


def described(settings: Point) -> str:
    """`learning_rate 1e-05, lora_r 8`."""
    names = short_names(tuple(settings))
    return ", ".join(f"{names[key]} {value(setting)}" for key, setting in settings.items())


def _words(study: Study, settings: Point) -> list[str]:
    own = {"output.output_dir": str(study.root / "trial"), "output.overwrite": False, "output.resume": False}
    fixed = [f"{key}={written(given)}" for key, given in study.fixed.items()]
    last = [f"{key}={written(given)}" for key, given in {**settings, **own}.items()]
    return [*fixed, *study.words, *last]


def _placed(study: Study, line: str) -> str:
    """A fault of a trial's recipe, at the line of the sweep's file that is meant."""
    key, _, text = line.removeprefix(_COMMAND_LINE).partition(": ")
    given = {word.partition("=")[0].strip() for word in study.words}
    for part in ("parameters", "set"):
        if line.startswith(_COMMAND_LINE) and f"{part}.{key}" in study.places and key not in given:
            return study.fault(f"{part}.{key}", text)
    return line


def whose(where: Sequence[Point], every: int) -> str:
    """Which trials a fault is of, in parentheses; nothing where it is of `every` one."""
    if len(where) == every:
        return ""
    return f" ({described(where[0])}" + (f", and {count(len(where) - 1, 'more trial')})" if len(where) > 1 else ")")


def _refuse_twins(study: Study, trials: Sequence[Trial]) -> None:
    """Two trials of one recipe would be one run."""
    first: dict[str, Trial] = {}
    for trial in trials:
        twin = first.setdefault(_identity(trial.recipe, tuple(study.parameters)), trial)
        if twin is not trial:
            raise UserError(study.fault("parameters", f"two trials are the same run: {described(twin.settings)}, and "
                                        f"{described(trial.settings)}; leave one out"))  # fmt: skip


def _identity(recipe: Recipe, varied: Sequence[str]) -> str:
    """Equal for the same run: settings that bear on the numbers, rows per step, and what else the sweep varies."""
    free = [key for key in varied if not identity.bears_on_numbers(key)]
    tree = recipe.model_dump(mode="json")
    rows = recipe.parallel.global_batch_size or [
        recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps,
        recipe.parallel.processes,
    ]
    return json.dumps([identity.recipe_hash(recipe), rows, [_at(tree, key) for key in free]], sort_keys=True)


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _recipes(root: Path) -> dict[Path, Recipe]:
    """The runs below a folder, by their folders. What this version cannot read is nobody's."""
    found = {}
    for path in sorted(root.glob("*/recipe.yaml"), reverse=True):
        try:
            found[path.parent] = load_recipe(path)
        except UserError:
            continue
    return found


def _is_free(folder: Path) -> bool:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return all(name in _CLAIMED or name.startswith("run.lock") or name.endswith(".unfinished") for name in names)


def _in(trial: Trial, folder: Path, study: Study) -> Trial:
    recipe = trial.recipe
    is_begun = (folder / "recipe.yaml").exists()
    # All would be called trial-000 in the trackers of all sweeps.
    name = f"{recipe.train.run_name or study.name}/{folder.name}"
    update = {
        "output": recipe.output.model_copy(update={"output_dir": str(folder), "resume": is_begun}),
        "train": recipe.train.model_copy(update={"run_name": name}),
    }
    return replace(trial, recipe=recipe.model_copy(update=update))


def _became(trial: Trial, records: Sequence[Record], jobs: Mapping[str, Queued]) -> Trial:
    run = RunDir(trial.folder)
    seconds = sum(record.seconds or 0.0 for record in records) or metric.number(metric.summary(run).get("seconds"))
    trial = replace(trial, seconds=seconds)
    if living(run.root):
        return replace(trial, state="running")
    if metric.summary(run) and any((run.model / name).exists() for name in ("config.json", "adapter_config.json")):
        return replace(trial, state="done")
    if jobs and (job := in_queue.of_run(run.root, jobs)) is not None:
        reason = job.reason if job.waits else None
        return replace(trial, state="queued" if job.waits else "running", reason=reason)
    last = records[-1] if records else None
    if last is not None and last.event == "end" and last.failed:
        return replace(trial, state="failed", reason=last.reason, said=last.said)
    attempts = read_attempts(SlurmDir(run.root))
    end = attempts[-1] if attempts and isinstance(attempts[-1], End) else None
    if end is not None and end.verdict == "stop" and end.reason != CANCELLED:
        return replace(trial, state="failed", reason=end.reason.partition(":")[0], said=end.reason)
    if not run.recipe.exists():
        return trial
    reason = end.reason if end is not None else last.reason if last is not None else None
    return replace(trial, state="unfinished", reason=reason)
