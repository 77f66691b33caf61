"""The trials of a sweep as the jobs of one array on Slurm, which the command does not wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launch.slurm import precheck, script, submit
from launch.slurm.in_queue import look
from launch.slurm.profile import Profile, read_profile
from launch.slurm.queue import Job as Queued
from launch.slurm.submit import Job
from launch.sweep.runner import Ended, say
from launch.sweep.study import Study
from launch.sweep.trials import Trial
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.render.wording import count
from sft_dist.rundir import command_line
from sft_dist.runlock import RunLock

_GROUP = "WANDB_RUN_GROUP"


class SlurmRunner:
    """Hands trials to Slurm: `nodes` for each (None: as the profile says), `at_once` of them at the same time.

    Raises :class:`UserError` for a profile that cannot be read.
    """

    waits = False

    def __init__(self, study: Study, cluster: str, nodes: int | None, at_once: int | None) -> None:
        profile = read_profile(Path(cluster))
        # What W&B shows as one; the user's own word counts.
        environment = {_GROUP: study.name} | profile.environment
        self._profile: Profile = profile.model_copy(update={"environment": environment})
        self._study = study
        self._cluster = cluster
        self._nodes = nodes
        self._at_once = at_once
        self._tried: set[tuple[int, int]] = set()

    def look(self, recipe: Recipe) -> list[str]:
        """What of a trial would fail in the queue or on a node, one a line."""
        try:
            job = self._job(recipe)
            precheck.refuse(recipe, self._profile, self._cluster, job.place)
            shape = (job.place.nodes, job.place.processes)
            if shape not in self._tried:
                precheck.test_only(script.text(job.executor()), self._cluster)
                self._tried.add(shape)
        except UserError as error:
            return str(error).splitlines()
        return []

    def run(self, trials: Sequence[Trial]) -> Iterator[Ended]:
        """Queue all of them and wait for none: nothing is told of. Raises :class:`UserError`."""
        yield from ()
        command, study = command_line(), self._study
        by_shape: dict[tuple[int, int], list[Job]] = {}
        # Asked once: nobody else submits trials of a sweep whose lock this process holds.
        queued = look()
        for trial in trials:
            job = self._job(trial.recipe)
            _write(job, command, queued)
            by_shape.setdefault((job.place.nodes, job.place.processes), []).append(job)
        for (nodes, processes), jobs in by_shape.items():
            at_once = min(self._at_once or len(jobs), len(jobs))
            made = submit.queue_array(jobs, study.root, f"sft-dist:{study.name}", at_once)
            number = str(made[0].job_id).partition("_")[0]
            say(f"{study.name}: {count(len(jobs), 'trial')} queued as job {number}, {nodes} x {processes} processes "
                f"each, {at_once} at once")  # fmt: skip

    def _job(self, recipe: Recipe) -> Job:
        return submit.job(recipe, self._profile, self._cluster, self._nodes)


def _write(job: Job, command: Sequence[str], queued: dict[str, Queued]) -> None:
    with RunLock(job.root, "sft-dist sweep"):
        # An earlier start of the job may have made the run's own by now.
        begun = (job.root / "recipe.yaml").exists()
        output = job.recipe.output.model_copy(update={"resume": begun})
        submit.refuse_if_among(job.root, queued)
        submit.write_job(replace(job, recipe=job.recipe.model_copy(update={"output": output})), command)
