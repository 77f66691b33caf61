"""Everything about the trials of a sweep that would fail later, before the first is begun."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from launch import check
from launch.sweep import metric
from launch.sweep.space import Point
from launch.sweep.study import Study
from launch.sweep.trials import Trial, whose
from sft_dist.config import Recipe
from sft_dist.errors import UserError

# Settings that no check looks at: trials that differ in them alone are checked as one, for a check may ask the hub.
_NOT_LOOKED_AT = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
                  "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed",
                  "run_name")  # fmt: skip
# Written before anything else: by it the folder is known as that of a sweep.
NAME = "sweep.json"
_GB = 1e9
_MOST_TOLD = 20


def refuse_faults(
    study: Study, todo: Sequence[Trial], every: Sequence[Trial], look: Callable[[Recipe], Sequence[str]]
) -> None:
    """Raise :class:`UserError` with all faults of the trials that are to be run, one a line.

    `every`: all trials, which have to have the metric; `look`: the faults of one, where it is to be run.
    """
    lines = _lines([(trial, _of_metric(study, trial)) for trial in every])
    looked_at: dict[str, list[str]] = {}
    for trial in todo:
        key = _as_checked(trial)
        if key not in looked_at:
            looked_at[key] = [_placed(study, fault) for fault in look(trial.recipe)]
    lines += _lines([(trial, looked_at[_as_checked(trial)]) for trial in todo])
    if lines:
        more = [f"and {len(lines) - _MOST_TOLD} more such lines"] if len(lines) > _MOST_TOLD else []
        raise UserError("\n".join(lines[:_MOST_TOLD] + more))
    _refuse_full_disk(study, todo)


def _of_metric(study: Study, trial: Trial) -> list[str]:
    fault = metric.fault(study.settings.metric, trial.recipe)
    return [study.fault("metric", fault)] if fault else []


def _lines(found: Sequence[tuple[Trial, Sequence[str]]]) -> list[str]:
    """Each fault once, with the trials that have it."""
    told: dict[str, list[Point]] = {}
    for trial, faults in found:
        for fault in faults:
            told.setdefault(fault, []).append(trial.settings)
    return [f"{text}{whose(settings, len(found))}" for text, settings in told.items()]


def _placed(study: Study, text: str) -> str:
    """A fault of a key that is varied, at its line in the sweep's file."""
    key, _, rest = text.partition(": ")
    return study.fault(f"parameters.{key}", rest) if key in study.parameters else text


def _as_checked(trial: Trial) -> str:
    recipe = trial.recipe
    output = {} if not recipe.output.resume else {"output": recipe.output}
    dump = recipe.model_dump_json(exclude={"output": True, "train": set(_NOT_LOOKED_AT)})
    return f"{dump}{output}"


def _refuse_full_disk(study: Study, todo: Sequence[Trial]) -> None:
    """Each trial alone may fit where all of them do not."""
    needs = [check.bytes_needed(trial.recipe) or 0 for trial in todo]
    parent = next(path for path in (study.root, *study.root.absolute().parents) if path.exists())
    free, need = shutil.disk_usage(parent).free, sum(needs)
    if need > free:
        raise UserError(
            study.fault("output_dir", f"{parent} has {free / _GB:.1f} GB free, and {len(todo)} trials write about "
                        f"{need / _GB:.1f} GB; free some, name another folder, or set train.save_strategy: no")
        )  # fmt: skip


def refuse_folder(study: Study) -> None:
    """Raise :class:`UserError` where the sweep's folder is something else: a file, a run, or results of others."""
    root = study.root
    if root.exists() and not root.is_dir():
        raise UserError(study.fault("output_dir", f"{root} is a file; name a folder"))
    if (root / "recipe.yaml").exists():
        raise UserError(study.fault("output_dir", f"{root} is the folder of a run; name one for the sweep"))
    foreign = [name for name in ("results.json", "results.csv", "results.svg") if (root / name).exists()]
    if foreign and not (root / NAME).exists():
        raise UserError(study.fault("output_dir", f"{root / foreign[0]} is of no sweep and would be replaced; name "
                                    "another folder"))  # fmt: skip
