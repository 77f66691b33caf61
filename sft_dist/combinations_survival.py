"""Settings of checkpoints and guards that cannot stand together (see `combinations`)."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config import GuardSection, Recipe
from sft_dist.rules import Finding, rule


@rule("parallel.offload_nvme_path", "train.save_strategy")
def _checkpoints_of_a_disk(recipe: Recipe) -> Iterator[Finding]:
    if recipe.parallel.offload_nvme_path is not None and recipe.train.save_strategy != "no":
        yield (
            "train.save_strategy",
            "no checkpoints are written of states that lie on a disk (parallel.offload_nvme_path) so far; set it to no",
        )


@rule("checkpoint.metric_for_best_model", "train.eval_strategy")
def _best_is_measured(recipe: Recipe) -> Iterator[Finding]:
    name = recipe.checkpoint.metric_for_best_model
    if name is None:
        return
    if recipe.train.eval_strategy == "no":
        yield "checkpoint.metric_for_best_model", f"{name} is never measured; set train.eval_strategy"
    elif not name.startswith("eval_"):
        yield "checkpoint.metric_for_best_model", f"{name} is no held-out value; their names begin with eval_"


@rule("checkpoint.keep_every", "train.save_strategy", "train.save_steps")
def _kept_steps_are_saved(recipe: Recipe) -> Iterator[Finding]:
    every, steps = recipe.checkpoint.keep_every, recipe.train.save_steps
    if every is not None and recipe.train.save_strategy == "steps" and every % steps:
        yield "checkpoint.keep_every", f"{every} is no multiple of train.save_steps ({steps}); make it one"


@rule("guard.spike_factor", "guard.spike_window", "guard.on_spike")
def _settings_of_spikes(recipe: Recipe) -> Iterator[Finding]:
    for key in ("spike_window", "on_spike"):
        given = getattr(recipe.guard, key) != GuardSection.model_fields[key].default
        if recipe.guard.spike_factor is None and given:
            yield f"guard.{key}", "has no effect without guard.spike_factor; set that or leave this out"


@rule("guard.nonfinite", "guard.on_spike", "train.save_strategy")
def _something_to_roll_back_to(recipe: Recipe) -> Iterator[Finding]:
    for key in ("nonfinite", "on_spike"):
        if getattr(recipe.guard, key) == "rollback" and recipe.train.save_strategy == "no":
            yield f"guard.{key}", "rollback goes back to a checkpoint, and none is written; set train.save_strategy"
