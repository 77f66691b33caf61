"""`sft-dist submit`, `resume` and `cancel`: the verbs that change what is in the queue."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from launch.slurm import in_queue, probing, script, submit
from launch.slurm.commands import ask
from launch.slurm.profile import read_profile
from launch.slurm.records import SlurmDir, read_submission
from launch.slurm.submit import Job
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, UserError
from sft_dist.recipe import load_recipe
from sft_dist.rundir import RunDir, command_line, write_text


def submit_run(recipe: Recipe, cluster: str, nodes: int | None, only_print: bool, probe_first: bool) -> int:
    """Submit a run, or show its script. Returns the exit code. Raises :class:`UserError`."""
    asked = submit.job(recipe, read_profile(Path(cluster)), cluster, nodes)
    if only_print:
        # The strategy is part of what could be wrong.
        asked.place.strategy(recipe)
        print(script.text(asked.executor()), end="")
        return EXIT_DONE
    return _queue(asked, probe_first)


def resume(name: str, cluster: str | None, nodes: int | None) -> int:
    """Submit a run again that is no longer in the queue, as it was or elsewhere. Returns the exit code."""
    at = _of_a_run(name)
    held = read_submission(at)
    assert held is not None
    run = RunDir(at.root.absolute())
    if run.summary.exists():
        print(f"{name} is done: nothing to go on with")
        return EXIT_DONE
    profile = read_profile(Path(cluster) if cluster else at.profile.absolute())
    if held.folder is not None:
        # Relative paths of the recipe go on meaning what they meant.
        _go_to(held.folder, name)
    recipe = load_recipe(run.recipe)
    # Wherever the run's folder has been moved to since.
    output = recipe.output.model_copy(update={"output_dir": str(run.root)})
    recipe = recipe.model_copy(update={"output": output})
    asked = submit.job(recipe, profile, cluster or held.cluster, nodes or held.nodes)
    result = Path(held.result) if held.result else None
    return _queue(replace(asked, module=held.module, result=result, hook=held.hook))


def cancel(name: str) -> int:
    """End a run's job; its checkpoints stay. Returns the exit code. Raises :class:`UserError`."""
    at = _of_a_run(name)
    held = read_submission(at)
    assert held is not None
    # scancel takes the number of a job that has ended, and says nothing. A job submitted by hand has another.
    found = in_queue.of_run(at.root, in_queue.look())
    if found is None:
        why = "was never queued" if held.job_id is None else f"job {held.job_id} is not in the queue any more"
        raise UserError(f"{name}: {why}; nothing to cancel")
    write_text(at.cancelled, "")
    try:
        ask(["scancel", found.id])
    except UserError:
        at.cancelled.unlink(missing_ok=True)
        raise
    print(f"job {found.id} is told to stop; `sft-dist resume {name}` goes on from its newest checkpoint")
    return EXIT_DONE


def _queue(asked: Job, probe_first: bool = False) -> int:
    for line in submit.check(asked):
        print("ok ", line, flush=True)
    if probe_first:
        print(*probing.probe(asked), sep="\n", flush=True)
    submission = submit.submit(asked, command_line())
    print(f"job {submission.job_id} is queued: {asked.place.nodes} x {asked.place.processes} processes under "
          f"{submission.strategy}; sft-dist status {asked.root}; sft-dist logs {asked.root} --follow")  # fmt: skip
    sys.stdout.flush()
    return EXIT_DONE


def _go_to(folder: str, name: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{name}: was submitted in {folder}: {error.strerror}; paths of its recipe are relative to that: restore it"
        ) from error


def _of_a_run(name: str) -> SlurmDir:
    """Raises :class:`UserError` for what is no run that was submitted."""
    at = SlurmDir(Path(name).expanduser())
    if not at.root.is_dir():
        raise UserError(f"{name}: no such folder; name a run's folder (its output.output_dir)")
    if read_submission(at) is None:
        raise UserError(f"{name}: was not submitted to Slurm: {at.submission} is missing; see sft-dist submit")
    return at
