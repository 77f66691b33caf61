"""A stage that is resolved: its whole recipe, its folder, and what it takes from which other stage."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.pipeline.spec import EVAL
from sft_dist.config import Recipe
from sft_dist.rundir import RunDir

FOLDER = "pipeline"


@dataclass(frozen=True)
class Stage:
    """One stage. All its paths are known before anything runs, so that it can be submitted behind what it needs."""

    name: str
    kind: str
    recipe: Recipe
    """Of an evaluation: whose held-out data, with the model that is measured."""
    folder: Path
    needs: tuple[str, ...]
    """The stages that must be done before, each once."""
    nodes: int | None
    """On a cluster; None: as the command says."""
    merges: bool
    """Whether its adapter is merged into its base at the end, for the stages that take its model."""
    stand_in: str
    """A model of the same architecture, tokenizer and limits that exists before the pipeline runs."""
    references: dict[str, Any] = field(default_factory=dict)
    """Settings of its recipe that refer to other stages, by dotted key, as they are written."""

    @property
    def trains(self) -> bool:
        return self.kind != EVAL

    @property
    def run(self) -> RunDir:
        """Names of the things in its folder, if it trains."""
        return RunDir(self.folder)

    @property
    def output(self) -> Path | None:
        """The model directory that other stages take; None for an evaluation."""
        if not self.trains:
            return None
        return merged(self.folder) if self.merges else self.run.model

    @property
    def result(self) -> Path:
        """What is complete or absent, is written last, and is another one after every run of the stage."""
        return self.run.summary if self.trains else self.folder / "measure.json"


def merged(folder: Path) -> Path:
    """Where the merged model of a run lies that trained an adapter."""
    return folder / "merged"


@dataclass(frozen=True)
class PipelineDir:
    """Names of the things that the pipeline itself keeps, in OUTPUT/pipeline. `root` is OUTPUT."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    @property
    def resolved(self) -> Path:
        return self.folder / "pipeline.yaml"

    def recipe(self, stage: str) -> Path:
        return self.folder / "recipes" / f"{stage}.yaml"

    def record(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def log(self, stage: str) -> Path:
        return self.folder / "logs" / f"{stage}.log"


@dataclass(frozen=True)
class Pipeline:
    """All stages, each behind what it needs."""

    file: Path
    root: Path
    stages: dict[str, Stage]

    @property
    def dir(self) -> PipelineDir:
        return PipelineDir(self.root)


def absolute(path: str | Path) -> Path:
    """A path that means the same in every folder; links stay as they are written."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def shown(path: Path) -> str:
    """A path as it is shortest from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
