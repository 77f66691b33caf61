"""Submitting a run to Slurm: checked first, then written beside the run, then queued through submitit."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.local import base_environment
from launch.place import Place
from launch.slurm import in_queue, precheck, registry, script
from launch.slurm.profile import Profile
from launch.slurm.queue import Job as Queued
from launch.slurm.records import SlurmDir, Submission, make_folder, now, write_submission
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import dump_recipe
from sft_dist.recipe_yaml import write
from sft_dist.rundir import claim, write_text
from sft_dist.runlock import RunLock


@dataclass(frozen=True)
class Job:
    """A run that is ready to be submitted. `cluster` is the name of the profile's file, `after` are jobs that must be
    done first; `strategy` is given where the recipe's model, by which `auto` chooses, is yet to be made; for the others
    see :class:`launch.slurm.records.Submission`."""

    recipe: Recipe
    profile: Profile
    cluster: str
    place: Place
    after: Sequence[str] = ()
    module: Sequence[str] = ()
    result: Path | None = None
    hook: Sequence[str] = ()
    probes: bool = False
    strategy: str | None = None

    @property
    def root(self) -> Path:
        return Path(self.recipe.output.output_dir)

    @property
    def name(self) -> str:
        return f"sft-dist:{self.root.name}" + f" of {self.root.parent.parent.name}" * self.probes

    def executor(self) -> Any:
        """submitit's executor. Raises :class:`UserError` where there is no Slurm here."""
        return script.executor(self.root, self.name, self.profile, self.place.nodes, self.place.processes, self.after)

    def submission(self, job_id: str | None) -> Submission:
        profile, requeue = self.profile, self.profile.requeue
        return Submission(
            job_id=job_id,
            name=self.name,
            cluster=self.cluster,
            nodes=self.place.nodes,
            tasks_per_node=self.place.processes,
            strategy=self.strategy or self.place.strategy(self.recipe),
            threads=_threads(profile),
            submitted=now(),
            partition=profile.partition,
            time_minutes=profile.time_minutes,
            requeue_max=requeue.max,
            same_step=requeue.same_step,
            in_place=requeue.in_place,
            signal_seconds=profile.signal_seconds,
            module=list(self.module),
            result=str(self.result) if self.result else None,
            hook=list(self.hook),
            folder=os.getcwd(),
        )


def job(recipe: Recipe, profile: Profile, cluster: str, nodes: int | None, after: Sequence[str] = ()) -> Job:
    """A run as a job. The recipe's `parallel.processes` counts for each node, and before what the profile says."""
    processes = recipe.parallel.processes or profile.tasks_per_node or profile.gpus_per_node or 1
    place = Place(profile.gpus(), processes, nodes or profile.nodes, is_here=False)
    return Job(recipe, profile, cluster, place, after)


def check(asked: Job) -> list[str]:
    """Lines that are worth knowing. Raises :class:`UserError` with all that would fail later, one a line."""
    refuse_if_queued(asked.root)
    lines = precheck.refuse(asked.recipe, asked.profile, asked.cluster, asked.place)
    # Dependencies are jobs that Slurm need not know yet when the script is only tried.
    alone = Job(asked.recipe, asked.profile, asked.cluster, asked.place)
    return [*lines, precheck.test_only(script.text(alone.executor()), asked.cluster)]


def submit(asked: Job, command: Sequence[str]) -> Submission:
    """Claim the run's folder, write what the job needs there, and queue it. Raises :class:`UserError`."""
    with RunLock(asked.root, "sft-dist submit"):
        refuse_if_queued(asked.root)
        write_job(asked, command)
        return queue([asked])[0]


def write_job(asked: Job, command: Sequence[str]) -> None:
    """Everything that the job reads, and what repeats it: script, recipe, profile, versions."""
    from submitit.helpers import DelayedSubmission

    from launch.slurm.task import Task

    executor = asked.executor()
    run = claim(asked.recipe, command)
    # Whatever start this is for Slurm, it goes on from what lies there.
    output = asked.recipe.output.model_copy(update={"resume": True, "overwrite": False})
    at = SlurmDir(run.root.absolute())
    try:
        write_text(run.recipe, dump_recipe(asked.recipe.model_copy(update={"output": output})))
        make_folder(at.folder)
        at.cancelled.unlink(missing_ok=True)
        write_text(at.script, script.text(executor))
        write_text(at.profile, write(asked.profile.model_dump(mode="json")))
        write_text(at.lock, environment_lock())
        DelayedSubmission(Task(at.root)).dump(at.task)
        os.chmod(at.task, 0o600)
        write_submission(at, asked.submission(None))
    except OSError as error:
        raise UserError(
            f"{at.folder}: cannot be written: {error.strerror}; free some space, or name another"
        ) from error


def queue(jobs: Sequence[Job]) -> list[Submission]:
    """Hand written jobs to Slurm, one by one."""
    return [_handed_over([one], one.executor())[0] for one in jobs]


def queue_array(jobs: Sequence[Job], root: Path, name: str, at_once: int) -> list[Submission]:
    """Hand written jobs of one shape to Slurm as one array, of which `at_once` run together.

    `root/slurm` keeps what is of all of them, each run's own folder the rest. Raises :class:`UserError`.
    """
    first, runs = jobs[0], [one.root for one in jobs]
    place = first.place
    try:
        make_folder(SlurmDir(root).folder)
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror}; name a folder of yours") from error
    executor = script.executor(root.absolute(), name, first.profile, place.nodes, place.processes, runs=runs)
    executor.update_parameters(array_parallelism=at_once)
    # submitit makes no array of one.
    return _handed_over(jobs, executor) if len(jobs) > 1 else queue(jobs)


def _handed_over(jobs: Sequence[Job], executor: Any) -> list[Submission]:
    from launch.slurm.task import Task

    tasks = [Task(one.root.absolute()) for one in jobs]
    before = os.umask(0o077)
    try:
        with executor.batch():
            queued = [executor.submit(task) for task in tasks]
    except Exception as error:
        raise _refused(error, jobs[0].root) from error
    finally:
        os.umask(before)
    found = []
    for one, made in zip(jobs, queued, strict=True):
        submission = one.submission(str(made.job_id))
        write_submission(SlurmDir(one.root.absolute()), submission)
        with contextlib.suppress(OSError):
            registry.add(one.root)
        found.append(submission)
    return found


def refuse_if_queued(root: Path) -> None:
    """Raise :class:`UserError` where a job of this run is queued or runs."""
    refuse_if_among(root, in_queue.look())


def refuse_if_among(root: Path, jobs: Mapping[str, Queued]) -> None:
    """Raise :class:`UserError` where one of the jobs is this run's."""
    found = in_queue.of_run(root, jobs)
    if found is not None:
        raise UserError(
            f"output.output_dir: {root} belongs to job {found.id}, which is {found.state.lower()}; wait for it, or end "
            f"it: sft-dist cancel {root}"
        )


@functools.cache
def environment_lock() -> str:
    """Every package that can be imported here, with its version, as pip reads it."""
    found = {f"{one.name}=={one.version}" for one in metadata.distributions() if one.name}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _threads(profile: Profile) -> int:
    given = base_environment(os.environ).get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return 1 if profile.gpus_per_node else profile.cpus_per_task


def _refused(error: Exception, root: Path) -> UserError:
    """What submitit raises when sbatch fails, in one line."""
    said = [*str(error).strip().splitlines(), type(error).__name__]
    return UserError(f"sbatch: {said[-2:][0]}; nothing was queued; mend it, then sft-dist resume {root}")
