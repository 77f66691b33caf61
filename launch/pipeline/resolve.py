"""A pipeline file into stages: references into paths, recipes with their settings, and every fault in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import recipe_files
from launch.pipeline import graph, spec
from launch.pipeline.graph import Link
from launch.pipeline.references import Reference, in_text, replaced, rewritten, texts
from launch.pipeline.spec import EVAL, Written
from launch.pipeline.stage import Pipeline, PipelineDir, Stage, absolute
from sft_dist.config import OutputSection, ParallelSection, PeftSection, Recipe
from sft_dist.data.sources import test_split_of
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from sft_dist.recipe_yaml import Fault, Keys, LineOf, Node, Scalar

_MODEL = "model.model_name_or_path"


def resolve(file: Path, words: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline and all its recipes. Raises :class:`UserError` with all faults, one a line."""
    written = spec.read(file, words)
    links, faults = graph.links(written)
    order, cycles = graph.ordered(links)
    if faults or cycles:
        raise UserError("\n".join(fault.line(str(file)) for fault in [*faults, *cycles]))
    resolver = _Resolver(written, links)
    for name in order:
        resolver.add(name)
    resolver.refuse_shared_folders()
    if resolver.faults:
        raise UserError("\n".join(dict.fromkeys(resolver.faults)))
    return Pipeline(file, resolver.root, resolver.stages)


class _Resolver:
    """Resolves one stage after the other, and notes the faults of each."""

    def __init__(self, written: Written, links: Mapping[str, Sequence[Link]]) -> None:
        self.written = written
        self.root = absolute(written.spec.output_dir)
        self.stages: dict[str, Stage] = {}
        self.faults: list[str] = []
        self._needs = graph.needs(links)
        every = [link.reference for below in links.values() for link in below]
        # Weights of an adapter alone are no model to train on; those of the base must be in them.
        self._taken = {reference.stage for reference in every if reference.what == "output"}

    def add(self, name: str) -> None:
        """Resolve a stage, behind those that it needs. Of one that needs a faulty one only the recipe is looked for."""
        try:
            if set(self._needs[name]) <= set(self.stages):
                self.stages[name] = self._stage(name)
            else:
                self._recipe_file(name)
        except UserError as error:
            start = "command line: "
            for line in str(error).splitlines():
                # The recipe's own key, of which the command line has one for each stage.
                self.faults.append(line.replace(start, f"{start}{name}.", 1) if line.startswith(start) else line)

    def refuse_shared_folders(self) -> None:
        """Note the stages whose folders are one, or lie one within the other."""
        taken = {"the pipeline itself": PipelineDir(self.root).folder}
        for name, stage in self.stages.items():
            real = Path(os.path.realpath(stage.folder))
            for other, folder in taken.items():
                there = Path(os.path.realpath(folder))
                if real == there or real in there.parents or there in real.parents:
                    relation = "is the folder of" if real == there else "and the folder of"
                    ending = "" if real == there else f", {folder}, lie one in the other"
                    words = f"{stage.folder} {relation} {other}{ending}; give each its own output_dir"
                    self._fault(name, "output_dir", words)
                    break
            taken[f"stage {name}"] = stage.folder

    def _stage(self, name: str) -> Stage:
        given = self.written.spec.stages[name]
        self._refuse_own_keys(name)
        recipe = load_recipe(self._recipe_file(name), self._words(name), self._layers(name))
        kind = given.kind or recipe.stage
        if kind not in (recipe.stage, EVAL):
            raise self._error(name, "kind", f"{kind}, but the recipe's stage is {recipe.stage}; leave kind out")
        folder = absolute(given.output_dir) if given.output_dir else self.root / name
        output = OutputSection(output_dir=str(folder))
        recipe = recipe.model_copy(update={"output": output})
        if kind == EVAL:
            recipe = _as_evaluated(recipe)
            if not (recipe.data.test_split_size or test_split_of(recipe)):
                raise self._error(
                    name, "recipe", "the recipe holds nothing out; set data.dataset_test_split or data.test_split_size"
                )
        model = recipe.model.model_name_or_path
        made_by = next((s for s in self.stages.values() if s.output is not None and str(s.output) == model), None)
        return Stage(
            name=name,
            kind=kind,
            recipe=recipe,
            folder=folder,
            needs=self._needs[name],
            nodes=given.nodes,
            merges=kind != EVAL and recipe.peft.use_peft and name in self._taken,
            stand_in=made_by.stand_in if made_by else model,
            references=self._references(name),
        )

    def _recipe_file(self, name: str) -> Path:
        """The file of a stage's recipe; that of the stage whose model it takes where an evaluation names none."""
        given = self.written.spec.stages[name].recipe
        if given is None:
            source = self._evaluated(name)
            if source is None:
                raise self._error(name, "recipe", "missing; name a recipe by path or packaged name")
            return self._recipe_file(source)
        beside = self.written.file.parent / Path(given).expanduser()
        if beside.suffix in (".yaml", ".yml") or beside.is_file():
            if beside.is_file():
                return beside
            raise self._error(name, "recipe", f"no such file: {beside}; paths are relative to the pipeline file")
        try:
            return recipe_files.find(given)
        except UserError as error:
            raise self._error(name, "recipe", str(error)) from error

    def _evaluated(self, name: str) -> str | None:
        """The stage whose model an evaluation without a recipe measures."""
        given = self.written.spec.stages[name]
        if given.kind != EVAL or not given.model:
            return None
        return next((n for n in self._needs[name] if given.model == str(Reference(n, "output"))), None)

    def _layers(self, name: str) -> list[dict[str, Node]]:
        """What the pipeline sets of a recipe; on top of that of another stage where the recipe is that one's."""
        given = self.written.spec.stages[name]
        source = self._evaluated(name) if given.recipe is None else None
        below = self._layers(source) if source else []
        file = str(self.written.file)
        node = self.written.node(name, "set")
        entries = node.entries if isinstance(node, Keys) else {}
        layer = {key: rewritten(value, file, self._path) for key, value in entries.items()}
        if given.model is not None:
            place = LineOf(self.written.place(name, "model"), file)
            text = replaced(given.model, self._path)
            layer[_MODEL] = Scalar(place, text, text)
        return [*below, layer]

    def _words(self, name: str) -> list[str]:
        given = self.written.spec.stages[name]
        source = self._evaluated(name) if given.recipe is None else None
        own = self.written.overrides.get(name, [])
        inherited = self._words(source) if source else []
        # Of the other stage's words that name its model none may win over this stage's own.
        inherited = [word for word in inherited if not word.startswith(f"{_MODEL}=")]
        return [*inherited, *(replaced(word, self._path) for word in own)]

    def _references(self, name: str) -> dict[str, Any]:
        """The settings of a stage that refer to others, as they are written."""
        given = self.written.spec.stages[name]
        source = self._evaluated(name) if given.recipe is None else None
        found = self._references(source) if source else {}
        found |= {key: value for key, value in given.set.items() if _refers(self.written.node(name, "set", key))}
        if given.model is not None and in_text(given.model)[0]:
            found[_MODEL] = given.model
        for word in self.written.overrides.get(name, ()):
            key, _, value = word.partition("=")
            if in_text(value)[0]:
                found[key] = value
        return found

    def _path(self, reference: Reference) -> str:
        stage = self.stages[reference.stage]
        return str(stage.folder if reference.what == "run" or stage.output is None else stage.output)

    def _refuse_own_keys(self, name: str) -> None:
        """Folder and resumption are the pipeline's to decide."""
        node = self.written.node(name, "set")
        keys = list(node.entries) if isinstance(node, Keys) else []
        mend = "the pipeline's own to set; write output_dir under the stage for another folder"
        for key in keys:
            if key.partition(".")[0] == "output":
                raise self._error(name, "set", f"{key}: {mend}", key)
        for word in self.written.overrides.get(name, ()):
            if word.startswith("output."):
                raise UserError(f"command line: {word.partition('=')[0]}: {mend}")

    def _fault(self, name: str, key: str, text: str, *below: str) -> None:
        place = self.written.place(name, key, *below)
        self.faults.append(Fault(place, f"stages.{name}.{key}", text).line(str(self.written.file)))

    def _error(self, name: str, key: str, text: str, *below: str) -> UserError:
        place = self.written.place(name, key, *below)
        return UserError(Fault(place, f"stages.{name}.{key}", text).line(str(self.written.file)))


def _refers(node: Node | None) -> bool:
    return any(in_text(text.text)[0] for text in texts(node))


def _as_evaluated(recipe: Recipe) -> Recipe:
    """A recipe with nothing left in it of a training but what bears on the data and the measure."""
    parallel = ParallelSection(strategy="single", processes=1)
    train = recipe.train.model_copy(update={"save_strategy": "no", "report_to": []})
    return recipe.model_copy(update={"peft": PeftSection(), "parallel": parallel, "train": train})
