"""The resolved pipeline, kept beside what it makes: itself a pipeline file, with whole recipes, that repeats it."""

from __future__ import annotations

from typing import Any

from launch.pipeline.stage import Pipeline, Stage
from sft_dist.recipe import dump_recipe
from sft_dist.recipe_yaml import write
from sft_dist.rundir import write_text

_HEAD = "# A resolved pipeline: `sft-dist pipeline` with this file, or its folder, goes on with it or shows it.\n"


def write_resolved(pipeline: Pipeline) -> None:
    """Write the pipeline and the recipes of its stages into OUTPUT/pipeline. Raises OSError."""
    directory = pipeline.dir
    for name, stage in pipeline.stages.items():
        path = directory.recipe(name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, dump_recipe(stage.recipe))
    stages = {name: _as_written(pipeline, stage) for name, stage in pipeline.stages.items()}
    write_text(directory.resolved, _HEAD + write({"output_dir": str(pipeline.root), "stages": stages}))


def _as_written(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    directory = pipeline.dir
    out: dict[str, Any] = {"kind": stage.kind}
    out["recipe"] = str(directory.recipe(stage.name).relative_to(directory.folder))
    # The paths are in the recipe; who needs whom is not.
    if stage.references:
        out["set"] = dict(stage.references)
    if stage.nodes is not None:
        out["nodes"] = stage.nodes
    return out | {"output_dir": str(stage.folder)}
