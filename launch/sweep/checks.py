"""Everything about the trials of a sweep that would fail later, before the first is begun."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from launch import check
from launch.sweep import metric
from launch.sweep.study import Study
from launch.sweep.trials import Trial, described
from sft_dist.errors import UserError

# Settings that no check looks at: trials that differ in them alone are checked as one, for a check may ask the hub.
_NOT_LOOKED_AT = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
                  "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed",
                  "run_name")  # fmt: skip
# Written before anything else: by it the folder is known as that of a sweep.
NAME = "sweep.json"
_GB = 1e9
_MOST_TOLD = 20


def refuse_faults(study: Study, todo: Sequence[Trial], every: Sequence[Trial]) -> None:
    """Raise :class:`UserError` with all faults of the trials that are to be run, one a line.

    `every`: all trials, which have to have the metric.
    """
    told: dict[str, list[Trial]] = {}
    for trial in every:
        if fault := metric.fault(study.settings.metric, trial.recipe):
            told.setdefault(study.fault("metric", fault), []).append(trial)
    looked_at: dict[str, list[check.Finding]] = {}
    for trial in todo:
        key = _as_checked(trial)
        if key not in looked_at:
            looked_at[key] = check.findings(trial.recipe)
        for finding in looked_at[key]:
            if finding.level != "fine":
                told.setdefault(finding.text, []).append(trial)
    lines = [f"{text}{_whose(trials, every if len(trials) > len(todo) else todo)}" for text, trials in told.items()]
    if lines:
        more = [f"and {len(lines) - _MOST_TOLD} more such lines"] if len(lines) > _MOST_TOLD else []
        raise UserError("\n".join(lines[:_MOST_TOLD] + more))
    _refuse_full_disk(study, todo)


def _as_checked(trial: Trial) -> str:
    recipe = trial.recipe
    output = {} if not recipe.output.resume else {"output": recipe.output}
    dump = recipe.model_dump_json(exclude={"output": True, "train": set(_NOT_LOOKED_AT)})
    return f"{dump}{output}"


def _whose(trials: Sequence[Trial], every: Sequence[Trial]) -> str:
    if len(trials) == len(every):
        return "" if len(every) == 1 else f" (all {len(every)} trials)"
    more = f", and {len(trials) - 1} more" if len(trials) > 1 else ""
    return f" ({described(trials[0].settings)}{more})"


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
