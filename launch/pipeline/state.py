"""What has become of a stage, and what is to be done with it: all by the files that lie there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.pipeline.stage import Pipeline, PipelineDir, Stage, shown
from sft_dist.checkpoints import folder as checkpoints
from sft_dist.errors import RecipeError, UserError
from sft_dist.identity import differences
from sft_dist.recipe import load_recipe
from sft_dist.rundir import write_text

_MODEL_FILES = ("config.json", "adapter_config.json")


class Record(BaseModel):
    """What the pipeline keeps of the latest start of a stage."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    inputs: dict[str, str]
    """By stage that was taken from: which run of it, see :func:`stamp`."""
    started: str
    ended: str | None = None
    code: int | None = None
    stopped: bool = False
    """Whether it was told to."""
    reason: str | None = None
    seconds: float = 0.0
    """Of all starts of this run that ended in order."""


@dataclass(frozen=True)
class Decision:
    """What is to be done with a stage, and why.

    `done`: nothing. `begin`: an empty folder. `resume`: from its newest checkpoint. `merge`: trained, but its adapter
    is not merged yet. `again`: what lies there is of another recipe or input; it is kept under another name.
    """

    action: Literal["done", "begin", "resume", "merge", "again"]
    why: str


def decide(stage: Stage, directory: PipelineDir, stamps: Mapping[str, str | None]) -> Decision:
    """What is to be done with a stage. `stamps`: of each stage that it needs, None for one that is not done.

    Raises :class:`UserError` for a folder with a run that is not the pipeline's, which nothing may touch.
    """
    held = stage.run.recipe
    if not held.exists():
        return Decision("begin", "")
    other, record = differences_of(stage), read_record(directory, stage.name)
    if other and record is None:
        raise UserError(
            f"stage {stage.name}: {stage.folder} holds a run that this pipeline did not start, of another recipe: "
            f"{other[0]}; name another output_dir under the stage, or move that run away"
        )
    inputs = record.inputs if record else {}
    changed = [name for name in stage.needs if stamps.get(name) is None or stamps[name] != inputs.get(name)]
    if is_only_claimed(stage, record):
        changed = []
    if changed and record is None:
        return Decision("again", f"it is not known which run of {changed[0]} it was made from")
    if changed:
        when = "is to run" if stamps.get(changed[0]) is None else "was run"
        return Decision("again", f"{changed[0]} {when} again")
    if other:
        return Decision("again", other[0])
    if is_complete(stage):
        return Decision("done", "")
    if stage.trains and _is_trained(stage):
        return Decision("merge", "")
    steps = checkpoints.complete(stage.run.checkpoints) if stage.trains else {}
    return Decision("resume", f"from checkpoint-{max(steps)}" if steps else "from the beginning")


def plan(pipeline: Pipeline) -> dict[str, Decision]:
    """What would be done with each stage if the pipeline were started now."""
    decisions: dict[str, Decision] = {}
    stamps: dict[str, str | None] = {}
    for name, stage in pipeline.stages.items():
        decisions[name] = decide(stage, pipeline.dir, {need: stamps[need] for need in stage.needs})
        # Merging anew changes nothing of what was made from the merged model before.
        stamps[name] = stamp(stage) if decisions[name].action in ("done", "merge") else None
    return decisions


def stamps_now(stage: Stage, pipeline: Pipeline) -> dict[str, str | None]:
    """Which runs of the stages that it needs lie there, complete; None for one that is not."""
    return {need: stamp(pipeline.stages[need]) if is_complete(pipeline.stages[need]) else None for need in stage.needs}


def is_complete(stage: Stage) -> bool:
    """Whether all is there that a stage leaves when it ends well."""
    if not stage.trains:
        return stage.result.is_file()
    whole = _is_trained(stage)
    return whole and (stage.output is None or _is_model(stage.output))


def stamp(stage: Stage) -> str | None:
    """What tells one finished run of a stage from another: SHA-256 of its result. None where there is none."""
    try:
        return hashlib.sha256(stage.result.read_bytes()).hexdigest()
    except OSError:
        return None


def read_record(directory: PipelineDir, name: str) -> Record | None:
    """What is kept of a stage's latest start; None where nothing is, or it cannot be read."""
    try:
        return Record.model_validate_json(directory.record(name).read_bytes())
    except (OSError, ValidationError):
        return None


def write_record(directory: PipelineDir, name: str, record: Record) -> None:
    """Keep it, complete or not at all."""
    path = directory.record(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(path, record.model_dump_json(indent=2) + "\n")


def set_aside(folder: Path) -> Path:
    """Give a run's folder another name beside it. Returns its new place."""
    place = free_name(folder)
    try:
        os.rename(folder, place)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be kept as {place.name}: {error.strerror}; move it away yourself, and start again"
        ) from error
    return place


def free_name(folder: Path) -> Path:
    """The next name for an old run, which nothing has yet."""
    places = (folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 10_000))
    return next(place for place in places if not os.path.lexists(place))


def now() -> str:
    """The time, in ISO 8601 and UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_only_claimed(stage: Stage, record: Record | None) -> bool:
    """Whether the stage was submitted and has not begun: what it is made from is not known before its job starts."""
    return record is not None and bool(stage.needs) and not record.inputs


def is_unmerged(stage: Stage) -> bool:
    """Whether the stage is trained and its adapter is still to be merged."""
    return stage.merges and _is_trained(stage) and not is_complete(stage)


def differences_of(stage: Stage) -> list[str]:
    """The settings in which the recipe in the stage's folder is another one. Raises :class:`UserError`."""
    try:
        held = load_recipe(stage.run.recipe)
    except RecipeError as error:
        raise UserError(
            f"stage {stage.name}: {shown(stage.run.recipe)} cannot be read by this version: "
            f"{str(error).splitlines()[0]}; name another output_dir under the stage, or move the run away"
        ) from error
    found = differences(held, stage.recipe)
    if not stage.trains and held.eval != stage.recipe.eval:
        # A training's own measure may be taken with other prompts; this is all that an evaluation does.
        found.append("eval: other prompts or answers there than here")
    return found


def _is_trained(stage: Stage) -> bool:
    return stage.result.is_file() and _is_model(stage.run.model)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)
