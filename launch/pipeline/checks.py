"""Everything that can be known of all stages before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from launch.pipeline import state
from launch.pipeline.stage import Pipeline, Stage
from launch.pipeline.state import Decision
from sft_dist.config import Recipe
from sft_dist.errors import UserError


def refuse_faults(
    pipeline: Pipeline,
    decisions: Mapping[str, Decision],
    look: Callable[[Stage, Recipe], None],
    queued: Collection[str],
) -> None:
    """Raise :class:`UserError` with the faults of all stages that are to run, one a line.

    A stage whose model an earlier one makes is checked with the model of the first one in the chain, which has the
    architecture, tokenizer and limits that it will get.
    `look` raises the faults of one, where it is to run; those that are `queued` were looked at.
    """
    lines = []
    for name, stage in pipeline.stages.items():
        if decisions[name].action in ("done", "merge") or name in queued:
            continue
        recipe = checked(stage, decisions[name])
        model_is_to_come = any(
            str(pipeline.stages[need].output) == recipe.model.model_name_or_path and decisions[need].action != "done"
            for need in stage.needs
        )
        if model_is_to_come:
            model = recipe.model.model_copy(update={"model_name_or_path": stage.stand_in})
            recipe = recipe.model_copy(update={"model": model})
            if recipe.output.resume:
                # The run that was claimed there is not of this model.
                output = recipe.output.model_copy(update={"resume": False, "output_dir": str(stage.folder / "new")})
                recipe = recipe.model_copy(update={"output": output})
        to_come = {str(pipeline.stages[need].output) for need in stage.needs if decisions[need].action != "done"}
        try:
            look(stage, without(recipe, to_come))
        except UserError as error:
            lines += [f"stage {name}: {line}" for line in str(error).splitlines()]
    if lines:
        raise UserError("\n".join(lines))


def without(recipe: Recipe, to_come: Collection[str]) -> Recipe:
    """A recipe without the rewards and the reference that earlier stages are yet to make: nothing is known of them."""
    ppo = recipe.ppo
    kept = {name: source for name, source in (ppo.rewards or {}).items() if source.model not in to_come}
    update = {"reward": None if ppo.reward in to_come else ppo.reward, "rewards": kept or None}
    reference = None if recipe.dpo.ref_model in to_come else recipe.dpo.ref_model
    dpo = recipe.dpo.model_copy(update={"ref_model": reference})
    return recipe.model_copy(update={"ppo": ppo.model_copy(update=update), "dpo": dpo})


def prepared(stage: Stage, decision: Decision) -> Recipe:
    """The recipe of a stage as its run gets it: to go on, or to begin in an empty folder."""
    if decision.action != "resume" or not stage.trains:
        return stage.recipe
    output = stage.recipe.output.model_copy(update={"resume": True})
    return stage.recipe.model_copy(update={"output": output})


def checked(stage: Stage, decision: Decision) -> Recipe:
    """The recipe of a stage as it is checked: what lies in its folder is no fault where that is given another name."""
    recipe = prepared(stage, decision)
    begins_anew = decision.action == "again" or (decision.action == "resume" and not stage.trains)
    if not begins_anew:
        return recipe
    # On the same disk, with the same rights.
    beside = state.free_name(stage.folder) if decision.action == "again" else stage.folder / "new"
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"output_dir": str(beside)})})
