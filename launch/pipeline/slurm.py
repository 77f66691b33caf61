"""The stages of a pipeline as jobs on Slurm, each behind those that it needs; the command waits for none of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch import recipe_files
from launch.pipeline import state
from launch.pipeline.runner import say
from launch.pipeline.stage import Pipeline, Stage, shown
from launch.pipeline.state import Decision, Record
from launch.place import Place
from launch.slurm import in_queue, precheck, script, submit
from launch.slurm.profile import read_profile
from launch.slurm.queue import Job as Queued
from launch.slurm.submit import Job
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, UserError
from sft_dist.runlock import RunLock


class SlurmRunner:
    """Submits stages. `nodes`: of those that name none; None: as the profile in the file `cluster` says.

    Raises :class:`UserError` for a profile that cannot be read.
    """

    def __init__(self, pipeline: Pipeline, command: Sequence[str], cluster: str, nodes: int | None) -> None:
        self._profile = read_profile(Path(cluster))
        self._pipeline = pipeline
        self._command = command
        self._cluster = cluster
        self._nodes = nodes
        self._count = 0
        self._tried: set[tuple[int, int, int]] = set()

    def look(self, stage: Stage, recipe: Recipe) -> None:
        """Raise :class:`UserError` with what of a stage would fail in the queue or on a node."""
        job = self._job(stage, recipe)
        precheck.refuse(recipe, job.profile, self._cluster, job.place)
        shape = (job.place.nodes, job.place.processes, job.profile.gpus_per_node)
        if shape not in self._tried:
            precheck.test_only(script.text(job.executor()), self._cluster)
            self._tried.add(shape)

    def start(self, stage: Stage, after: Sequence[str]) -> str:
        """Queue a stage behind the jobs in `after`, unless it is queued. Returns its job's id."""
        found = in_queue.of_run(stage.folder, in_queue.look())
        if found is not None:
            return found.id
        decision = state.plan(self._pipeline)[stage.name]
        if decision.action == "again":
            with RunLock(stage.folder, "sft-dist pipeline"):
                pass
            say(f"{stage.name}: what was there is kept as {shown(state.set_aside(stage.folder))}")
        with RunLock(stage.folder, "sft-dist pipeline"):
            self._keep_record(stage, decision)
            job = replace(self._job(stage, self._recipe(stage)), after=after)
            submit.write_job(job, self._command)
            number = str(submit.queue([job])[0].job_id)
        self._count += 1
        behind = f" behind {', '.join(after)}" if after else ""
        say(f"{stage.name}: queued as job {number}{behind}, {job.place.nodes} x {job.place.processes} processes")
        return number

    def finish(self) -> int:
        """Say how to look at what was queued. Returns 0."""
        folder = shown(self._pipeline.root)
        if self._count:
            say(f"sft-dist pipeline {folder} --status shows how they stand")
        else:
            say(f"{folder}: nothing to queue")
        return EXIT_DONE

    def _keep_record(self, stage: Stage, decision: Decision) -> None:
        """By the record a folder is the pipeline's. What the stage is made from is known when its job begins."""
        before = state.read_record(self._pipeline.dir, stage.name)
        goes_on = before is not None and decision.action in ("resume", "merge")
        record = Record(inputs=before.inputs if before and goes_on else {}, started=state.now(),
                        seconds=before.seconds if before and goes_on else 0.0)  # fmt: skip
        state.write_record(self._pipeline.dir, stage.name, record)

    @staticmethod
    def _recipe(stage: Stage) -> Recipe:
        output = stage.recipe.output.model_copy(update={"resume": stage.run.recipe.exists()})
        return stage.recipe.model_copy(update={"output": output})

    def _job(self, stage: Stage, recipe: Recipe) -> Job:
        hook = (sys.executable, "-m", "launch.pipeline.hook", str(self._pipeline.root), stage.name)
        if stage.trains:
            job = submit.job(recipe, self._profile, self._cluster, stage.nodes or self._nodes)
            known = recipe.model.model_copy(update={"model_name_or_path": stage.stand_in})
            return replace(
                job,
                hook=hook,
                result=stage.output / "config.json" if stage.merges and stage.output else None,
                strategy=job.place.strategy(recipe.model_copy(update={"model": known})),
            )
        # One process, and no more of a node than that needs.
        alone = {"gpus_per_node": min(1, self._profile.gpus_per_node), "exclusive": False}
        profile = self._profile.model_copy(update=alone)
        model = recipe_files.model_folder(recipe.model.model_name_or_path)
        module = ("sft_dist.evaluation", model, str(stage.run.recipe), "--output", str(stage.folder))
        place = Place(profile.gpus(), 1, 1, is_here=False)
        return Job(recipe, profile, self._cluster, place, module=module, result=stage.result, hook=hook)


def queued(pipeline: Pipeline, must_know: bool) -> dict[str, Queued]:
    """The stages that are in the queue. Slurm is asked where one was ever submitted.

    Raises :class:`UserError` where it does not answer and they `must` be known; else none is.
    """
    if not any((stage.folder / "slurm" / "submission.json").exists() for stage in pipeline.stages.values()):
        return {}
    try:
        jobs = in_queue.look()
    except UserError as error:
        if must_know:
            raise
        print(f"sft-dist: {error}; what is in the queue is not known", file=sys.stderr)
        return {}
    found = {name: in_queue.of_run(stage.folder, jobs) for name, stage in pipeline.stages.items()}
    return {name: job for name, job in found.items() if job is not None}


def refuse_other_jobs(pipeline: Pipeline, decisions: Mapping[str, Decision], jobs: Mapping[str, Queued]) -> None:
    """Raise :class:`UserError` where the job of a stage is of another recipe, or waits for what will not come."""
    for name, job in jobs.items():
        stage = pipeline.stages[name]
        mend = f"end it first: sft-dist cancel {shown(stage.folder)}"
        if other := state.differences_of(stage):
            raise UserError(f"stage {name}: job {job.id} is {job.state.lower()}, of another recipe: {other[0]}; {mend}")
        new = [need for need in stage.needs if need not in jobs and decisions[need].action != "done"]
        if new:
            raise UserError(
                f"stage {name}: job {job.id} is {job.state.lower()} behind an earlier job of {new[0]}; {mend}"
            )
