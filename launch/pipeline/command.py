"""`sft-dist pipeline`: check all stages, then run those that are not done; or show what has become of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.pipeline import checks, slurm, spec, state, work
from launch.pipeline.resolve import resolve
from launch.pipeline.resolved import write_resolved
from launch.pipeline.runner import Runner, runner_for, say
from launch.pipeline.stage import Pipeline, shown
from launch.pipeline.state import Decision
from launch.slurm.queue import Job
from sft_dist.errors import EXIT_DONE, UserError
from sft_dist.rundir import command_line
from sft_dist.runlock import RunLock, refuse_if_alive


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    status_only: bool = False
    check_only: bool = False
    tries: int = 0
    cluster: str | None = None
    nodes: int | None = None


def run(name: str, words: Sequence[str], wishes: Wishes) -> int:
    """Run a pipeline, or show it. Returns the exit code. Raises :class:`UserError` before anything has started."""
    pipeline = resolve(spec.find(name), words)
    if wishes.status_only:
        return _show(pipeline)
    runner = runner_for(pipeline, command_line(), wishes.tries, wishes.cluster, wishes.nodes)
    try:
        refuse_if_alive(pipeline.dir.folder)
    except UserError as error:
        raise UserError(str(error).replace("output.output_dir", "output_dir", 1)) from error
    decisions = state.plan(pipeline)
    jobs = slurm.queued(pipeline, must_know=wishes.cluster is not None)
    if wishes.cluster is None:
        _refuse_queued(pipeline, jobs)
    slurm.refuse_other_jobs(pipeline, decisions, jobs)
    checks.refuse_faults(pipeline, decisions, runner.look, jobs)
    _tell(pipeline, decisions, jobs)
    if wishes.check_only:
        return EXIT_DONE
    with RunLock(pipeline.dir.folder, "sft-dist pipeline") as lock:
        if lock.replaced:
            say(lock.replaced)
        try:
            write_resolved(pipeline)
        except OSError as error:
            raise UserError(f"{pipeline.dir.folder}: cannot be written: {error.strerror}; mend output_dir") from error
        return _start(pipeline, decisions, runner)


def _start(pipeline: Pipeline, decisions: Mapping[str, Decision], runner: Runner) -> int:
    ids: dict[str, str] = {}
    for name, stage in pipeline.stages.items():
        if decisions[name].action != "done":
            ids[name] = runner.start(stage, [ids[need] for need in stage.needs if need in ids])
    return runner.finish()


def _refuse_queued(pipeline: Pipeline, jobs: Mapping[str, Job]) -> None:
    for name, job in jobs.items():
        folder = shown(pipeline.stages[name].folder)
        raise UserError(
            f"stage {name}: job {job.id} is {job.state.lower()}; wait for it, or end it: sft-dist cancel {folder}"
        )


def _tell(pipeline: Pipeline, decisions: Mapping[str, Decision], jobs: Mapping[str, Job]) -> None:
    """What is going to be done, before it is."""
    say(f"{shown(pipeline.root)}: {len(pipeline.stages)} stages")
    for name, stage in pipeline.stages.items():
        behind = f", behind {' and '.join(stage.needs)}" if stage.needs and decisions[name].action != "done" else ""
        told = f"{name}: job {jobs[name].id} is {jobs[name].state.lower()}" if name in jobs else None
        say(f"  {told or work.told(stage, decisions[name])}{behind}")


def _show(pipeline: Pipeline) -> int:
    import sys

    from rich.console import Console

    from launch.pipeline import show, view

    show.to_terminal(
        pipeline,
        view.rows(pipeline, slurm.queued(pipeline, must_know=False)),
        Console(width=None if sys.stdout.isatty() else 110),
    )
    return EXIT_DONE
