"""The pipeline file as a typed tree, and what the command line changes in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from launch import recipe_files, typed_yaml
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe_names import near_name
from sft_dist.recipe_yaml import COMMAND_LINE, Fault, Keys, Node

EVAL = "eval"
# What trains is what a recipe can say of itself.
TRAINING: tuple[str, ...] = get_args(Recipe.model_fields["stage"].annotation)
WHAT = "a pipeline file, with output_dir and stages"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
if not TRAINING:
    raise TypeError("Recipe.stage is no Literal")


class StageSpec(BaseModel):
    """One stage as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal[(*TRAINING, EVAL)] | None = None  # type: ignore[valid-type]
    """What it does; unset: the training of its recipe."""
    recipe: str | None = None
    """Packaged name, or path relative to the pipeline file."""
    model: str | None = None
    """Short for `set: {model.model_name_or_path: ...}`."""
    set: dict[str, Any] = {}
    """Settings of the recipe by dotted key."""
    nodes: PositiveInt | None = None
    """On a cluster."""
    output_dir: str | None = Field(default=None, min_length=1)
    """Folder of the stage; unset: its name, below the pipeline's."""


class PipelineSpec(BaseModel):
    """A pipeline as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_dir: str = Field(min_length=1)
    stages: dict[str, StageSpec] = Field(min_length=1)


@dataclass(frozen=True)
class Written:
    """A pipeline file that has been read: its tree, the nodes behind it, and the overrides of each stage's recipe."""

    file: Path
    spec: PipelineSpec
    root: Keys
    overrides: dict[str, list[str]]

    def node(self, stage: str, *path: str) -> Node | None:
        """The node of a key of a stage, None where it is not given."""
        found: Node | None = self.root
        for name in ("stages", stage, *path):
            found = found.entries.get(name) if isinstance(found, Keys) else None
        return found

    def place(self, stage: str, *path: str) -> int:
        """The line of a key of a stage, or of what stands nearest above it."""
        while path and self.node(stage, *path) is None:
            path = path[:-1]
        found = self.node(stage, *path)
        return found.place if found is not None else 0


def find(name: str) -> Path:
    """The file of a pipeline, given by path, by its output folder, or by the name of a packaged one.

    Raises :class:`UserError`.
    """
    path = Path(name).expanduser()
    resolved = path / "pipeline" / "pipeline.yaml"
    if path.is_dir() and resolved.is_file():
        return resolved
    known = recipe_files.pipelines()
    if path.exists() or path.suffix in (".yaml", ".yml") or name not in known:
        if not path.is_file():
            near = near_name(name.removesuffix(recipe_files.PIPELINE), list(known))
            mend = f"did you mean {near}" if near else "give a pipeline file, or the output folder of a pipeline"
            raise UserError(f"{name}: no such pipeline, {mend}")
        return path
    return known[name]


def read(file: Path, words: Sequence[str] = ()) -> Written:
    """Read a pipeline file, with the overrides of the command line. Raises :class:`UserError` with all faults."""
    bare, _ = typed_yaml.read_keys(file, WHAT)
    stages = bare.entries.get("stages")
    names = list(stages.entries) if isinstance(stages, Keys) else []
    own, below, faults = _dealt_out(words, names)
    spec = None
    try:
        spec = typed_yaml.read_typed(file, PipelineSpec, WHAT, own)
    except UserError as error:
        raise UserError("\n".join([str(error), *(fault.line(str(file)) for fault in faults)])) from None
    root, _ = typed_yaml.read_keys(file, WHAT, own)
    written = Written(file, spec, root, below)
    faults += [
        Fault(written.place(name), f"stages.{name}", "a name is made of letters, digits, - and _; rename it")
        for name in spec.stages
        if not re.fullmatch(_NAME, name)
    ]
    if faults:
        raise UserError("\n".join(fault.line(str(file)) for fault in faults))
    return written


def _dealt_out(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[Fault]]:
    """The overrides of the pipeline's own keys, and those of the recipe of each stage."""
    own: list[str] = []
    below: dict[str, list[str]] = {}
    faults: list[Fault] = []
    for word in words:
        key, equals, value = word.partition("=")
        stage, _, rest = key.partition(".")
        if not equals or not all(key.split(".")):
            faults.append(Fault(COMMAND_LINE, word or "''", "not of the form stage.section.key=value"))
        elif key == "output_dir":
            own.append(word)
        elif stage not in names:
            near = near_name(stage, list(names))
            mend = f"did you mean {near}" if near else f"the pipeline has {', '.join(names)}"
            faults.append(Fault(COMMAND_LINE, key, f"no such stage, {mend}"))
        elif "." in rest:
            below.setdefault(stage, []).append(f"{rest}={value}")
        elif rest:
            own.append(f"stages.{word}")
        else:
            faults.append(Fault(COMMAND_LINE, key, f"is a stage; write {key}.section.key=value"))
    return own, below, faults
