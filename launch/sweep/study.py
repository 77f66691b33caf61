"""The file of a sweep: what is varied, what is fixed, and by which number the trials are compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from launch import recipe_files
from launch.sweep import space
from launch.sweep.space import Parameter, Range
from launch.typed_yaml import read_keys, read_typed
from sft_dist.config import MixtureSource
from sft_dist.config_base import Location, Name, Section, Seed
from sft_dist.errors import UserError
from sft_dist.recipe_bind import field_at
from sft_dist.recipe_names import (
    SECTIONS,
    Unknown,
    sections_below,
    unknown_key,
    unknown_section,
    unknown_source_key,
)
from sft_dist.recipe_values import Wrong, coerce, takes_keys
from sft_dist.recipe_yaml import COMMAND_LINE, Fault, Keys, Node

_WHAT = "the YAML file of a sweep"
# More is a mistake or a task for random search.
MOST_TRIALS = 1000


def _keys(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("expected recipe keys with their values, such as `train.learning_rate: [1.0e-5, 2.0e-5]`")
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_keys)]


class SweepFile(Section):
    """The keys of a sweep's file."""

    recipe: Name
    """Recipe of all trials: a file, relative to this one, or the name of a packaged recipe."""
    output_dir: Location
    """Folder of the sweep; each trial is a run in a folder below it."""
    method: Literal["grid", "random"] = "grid"
    """Every combination of the values, or so many `trials` by chance."""
    trials: PositiveInt | None = None
    """Number of random trials."""
    seed: Seed = 0
    """Seed of the random values."""
    metric: Name = "eval_loss"
    """A name from `metrics.jsonl` or `summary.json`."""
    metric_value: Literal["last", "best"] = "last"
    """Which value of a run counts, where it has several: that of the final model, or the best on the way."""
    greater_is_better: bool | None = None
    """Unset: true for speeds, accuracies and MFU only."""
    at_once: PositiveInt | None = None
    """Trials that run at the same time; on this machine they run one after another."""
    set: Settings = Field(default_factory=dict)
    """Recipe settings of all trials, by dotted key."""
    parameters: Settings
    """What is varied, by dotted key: a list of values or, by chance, `{min: ..., max: ..., log: true}`."""


@dataclass(frozen=True)
class Study:
    """A sweep as it was asked for. `fixed` and `parameters` are by dotted key, `places` tell their lines.

    `words` are overrides of the recipe from the command line.
    """

    file: Path
    settings: SweepFile
    recipe: Path
    fixed: Mapping[str, Any]
    parameters: Mapping[str, Parameter]
    places: Mapping[str, tuple[int, str]]
    words: tuple[str, ...]

    @property
    def root(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def name(self) -> str:
        return self.root.absolute().name

    @property
    def greater_is_better(self) -> bool:
        from launch.sweep.metric import greater_is_better

        given = self.settings.greater_is_better
        return greater_is_better(self.settings.metric) if given is None else given

    def fault(self, key: str, text: str) -> str:
        """The line about one key of the file (`set.KEY` and `parameters.KEY` among them)."""
        place, name = self.places.get(key, (0, key))
        return Fault(place, name, text).line(str(self.file))


def read_study(file: Path, words: Sequence[str] = ()) -> Study:
    """The sweep of a file. Words `KEY=value` override the file's keys, others `section.key=value` the recipe's.

    Raises :class:`UserError` with all faults, one a line.
    """
    own = [word for word in words if word.partition("=")[0].split(".")[0] in SweepFile.model_fields]
    of_recipe = [word for word in words if word not in own]
    settings = read_typed(file, SweepFile, _WHAT, own)
    root, _ = read_keys(file, _WHAT, own)
    reader = _Reader(root)
    study = Study(
        file=file,
        settings=settings,
        recipe=_recipe(file, settings.recipe),
        fixed=reader.fixed(),
        parameters=reader.parameters(),
        places=reader.places,
        words=tuple(of_recipe),
    )
    lines = [fault.line(str(file)) for fault in sorted(reader.faults, key=lambda fault: fault.place)]
    if lines := lines or [*_faults(study)]:
        raise UserError("\n".join(lines))
    return study


def points(study: Study) -> list[space.Point]:
    """The settings of each trial, in their order."""
    if study.settings.method == "grid":
        lists = {key: p for key, p in study.parameters.items() if isinstance(p, space.Choices)}
        return list(space.grid(lists))
    return space.draw(study.parameters, study.settings.trials or 1, study.settings.seed)


def _recipe(file: Path, name: str) -> Path:
    beside = file.parent / Path(name).expanduser()
    if beside.exists():
        return beside
    try:
        return recipe_files.find(name) if name in recipe_files.packaged() else _missing(beside, name)
    except UserError as error:
        raise UserError(f"{file}: recipe: {error}") from error


def _missing(beside: Path, name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        raise UserError(f"no such file: {beside}; the path is relative to the file of the sweep")
    return recipe_files.find(name)


def _faults(study: Study) -> Iterator[str]:
    """What is wrong with the sweep as a whole."""
    settings = study.settings
    if not study.parameters:
        yield study.fault("parameters", "nothing is varied; name a recipe key with a list of values")
    for key in study.parameters:
        if key in study.fixed:
            yield study.fault(f"set.{key}", "is varied under parameters, too; keep one")
        for word in study.words:
            if word.partition("=")[0].strip() == key:
                yield f"command line: {key}: is varied by the sweep; leave it out, or override parameters.{key}=[...]"
    if settings.method == "random":
        if settings.trials is None:
            yield study.fault("trials", "is missing; say how many trials are drawn by chance")
        elif settings.trials > MOST_TRIALS:
            yield study.fault("trials", f"{settings.trials:,} are more than {MOST_TRIALS:,}; lower it")
        return
    if settings.trials is not None:
        yield study.fault("trials", "a grid has as many trials as combinations; leave it out, or set method: random")
    for key, each in study.parameters.items():
        if isinstance(each, Range):
            yield study.fault(f"parameters.{key}", "a grid takes lists, this is a range; list values, or set method: "
                              "random")  # fmt: skip
    size = space.grid_size(study.parameters)
    if size > MOST_TRIALS:
        sides = " x ".join(str(len(p.values)) for p in study.parameters.values() if isinstance(p, space.Choices))
        yield study.fault("parameters", f"a grid of {sides} = {size:,} trials is more than {MOST_TRIALS:,}; leave "
                          "values out, or set method: random with trials")  # fmt: skip


class _Reader:
    """Reads `set` and `parameters` and notes every fault with its line."""

    def __init__(self, root: Keys) -> None:
        self.faults: list[Fault] = []
        self.places: dict[str, tuple[int, str]] = {name: (node.place, name) for name, node in root.entries.items()}
        self._root = root

    def fixed(self) -> dict[str, Any]:
        return dict(self._read("set", coerce))

    def parameters(self) -> dict[str, Parameter]:
        return dict(self._read("parameters", space.parameter))

    def _read(self, part: str, read: Any) -> Iterator[tuple[str, Any]]:
        node = self._root.entries.get(part)
        for key, below in self._flat(part, node).items() if isinstance(node, Keys) else ():
            path = key.split(".")
            annotation = _annotation(path)
            self.places[f"{part}.{key}"] = (below.place, f"{part}.{key}")
            if path[0] == "output":
                self._note(part, key, below, "is the sweep's own, which sets the folder of each trial; leave it out")
            elif annotation is None:
                self._note(part, key, below, _unknown(path).text)
            else:
                try:
                    yield key, read(below, annotation)
                except Wrong as wrong:
                    self._note(part, key, below, str(wrong))

    def _flat(self, part: str, node: Keys) -> dict[str, Node]:
        """By dotted key; `train: {seed: ...}` is `train.seed: ...`. What the command line says counts."""
        found: dict[str, Node] = {}
        for key, below in _leaves("", node, ranges=part == "parameters"):
            if key in found and COMMAND_LINE not in (found[key].place, below.place):
                self._note(part, key, below, "given twice; keep one")
            if key not in found or below.place == COMMAND_LINE:
                found[key] = below
        return found

    def _note(self, part: str, key: str, node: Node, text: str) -> None:
        self.faults.append(Fault(node.place, f"{part}.{key}", text))


def _leaves(outer: str, node: Keys, ranges: bool) -> Iterator[tuple[str, Node]]:
    """The keys that hold values. Below `parameters` (`ranges`) the sources of a mixture are no value of their own."""
    for name, below in node.entries.items():
        key = f"{outer}.{name}" if outer else name
        opens = key in SECTIONS or (ranges and (key == "data.mixture" or re.fullmatch(r"data\.mixture\.[^.]+", key)))
        if isinstance(below, Keys) and opens:
            yield from _leaves(key, below, ranges)
        else:
            yield key, below


def _annotation(path: Sequence[str]) -> Any:
    """The type of the setting at a path of names, None where there is none."""
    field = field_at(path)
    if field is not None:
        return None if path[0] in SECTIONS and len(path) == 1 else field.annotation
    outer = field_at(path[:2]) if len(path) == 3 else None
    # Such as train.lr_scheduler_kwargs.min_lr, whose names are a library's.
    is_open = outer is not None and takes_keys(outer.annotation) and sections_below(outer.annotation) is None
    return bool | int | float | str if is_open else None


def _unknown(path: Sequence[str]) -> Unknown:
    if len(path) == 1:
        found = unknown_section(path[0])
        return Unknown("is a section; name one of its keys", None) if path[0] in SECTIONS else found
    if path[0] not in SECTIONS:
        return unknown_section(path[0])
    if path[:2] == ["data", "mixture"] and len(path) == 4 and path[3] not in MixtureSource.model_fields:
        return unknown_source_key(".".join(path[:3]), path[3])
    return unknown_key(path[0], path[1]) if len(path) == 2 else Unknown("no such key", None)
