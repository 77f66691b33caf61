"""`sft-dist sweep SWEEP.yaml`: many trials of one recipe, and what they came to."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import in_queue
from launch.slurm.queue import Job
from launch.sweep import checks, history, results, trials
from launch.sweep.runner import Ended, LocalRunner, Runner, say
from launch.sweep.study import Study, read_study
from launch.sweep.trials import State, Trial
from sft_dist.errors import EXIT_BUG, EXIT_DONE, EXIT_RESUMABLE, UserError
from sft_dist.render.sweep import SweepReport
from sft_dist.rundir import command_line, without_secrets, write_text
from sft_dist.runlock import RunLock


@dataclass(frozen=True)
class Wishes:
    """The options of the command. `tries`: starts after the first of a trial that dies."""

    show_only: bool = False
    report_only: bool = False
    retry_failed: bool = False
    tries: int = 0
    cluster: str | None = None
    nodes: int | None = None
    at_once: int | None = None


def sweep(file: Path, words: Sequence[str], wishes: Wishes) -> int:
    """Run what is left of a sweep and show what it came to. Raises :class:`UserError`.

    Returns 0 where all trials are done, 75 where some can go on, 1 where some failed.
    """
    study = read_study(file, words)
    runner = _runner(study, wishes)
    checks.refuse_folder(study)
    every = _look(study, runner)
    if wishes.report_only:
        _report(study, every, write=study.root.is_dir())
        return EXIT_DONE
    todo = _todo(every, wishes.retry_failed)
    checks.refuse_faults(study, todo, every, runner.look)
    asked = study.settings.trials
    if asked is not None and len(every) < asked:
        say(f"{study.name}: {asked} trials were asked for, {len(every)} different ones exist")
    if wishes.show_only:
        _show(results.collect(study, every, ranked=False), with_results=False)
        return EXIT_DONE
    with _locked(study):
        # Another sweep may have ended between the look and the lock.
        every = _look(study, runner)
        todo = _todo(every, wishes.retry_failed)
        _begin(study, every, todo)
        was_stopped = _run(study, runner, todo)
        if not runner.waits:
            say(f"sft-dist sweep {study.file} --report shows how they stand, sft-dist status, too")
            return EXIT_DONE
        every = _look(study, runner)
        _report(study, every, write=True)
    return _code({trial.state for trial in every}, was_stopped)


def _runner(study: Study, wishes: Wishes) -> Runner:
    """Whoever runs the trials: this machine, or a cluster."""
    at_once = wishes.at_once or study.settings.at_once
    if wishes.cluster is not None:
        from launch.sweep.slurm import SlurmRunner

        if wishes.tries:
            raise UserError("--retries: is for a sweep on this machine; on Slurm the profile's `requeue` counts: leave "
                            "it out")  # fmt: skip
        return SlurmRunner(study, wishes.cluster, wishes.nodes, at_once)
    if wishes.nodes is not None:
        raise UserError("--nodes: is for a sweep on Slurm; leave it out, or add --cluster PROFILE")
    if wishes.at_once not in (None, 1):
        raise UserError(f"--at-once: {at_once} trials at once are for a sweep on Slurm; on this machine they run one "
                        "after another; leave it out, or add --cluster PROFILE")  # fmt: skip
    return LocalRunner(study.name, wishes.tries)


def _look(study: Study, runner: Runner) -> list[Trial]:
    return trials.settle(
        study, trials.resolve(study), history.read(study.root), _jobs(study, must_know=not runner.waits)
    )


def _jobs(study: Study, must_know: bool) -> dict[str, Job]:
    """What is in Slurm's queue. Nobody is asked for a sweep that never was there."""
    if not any(study.root.glob("*/slurm/submission.json")):
        return {}
    try:
        return in_queue.look()
    except UserError as error:
        if must_know:
            raise
        print(f"sft-dist: {error}; trials in the queue are shown as unfinished", file=sys.stderr)
        return {}


def _todo(every: Sequence[Trial], retry_failed: bool) -> list[Trial]:
    wanted = ("waiting", "unfinished", "failed") if retry_failed else ("waiting", "unfinished")
    return [trial for trial in every if trial.state in wanted]


@contextlib.contextmanager
def _locked(study: Study) -> Iterator[None]:
    lock = RunLock(study.root, "sft-dist sweep")
    try:
        lock.acquire()
    except UserError as error:
        raise UserError(study.fault("output_dir", str(error).partition(": ")[2])) from error
    try:
        if lock.replaced:
            print(f"sft-dist: {lock.replaced}", file=sys.stderr)
        yield
    finally:
        lock.release()


def _begin(study: Study, every: Sequence[Trial], todo: Sequence[Trial]) -> None:
    """Say what there is to do, and write down what the sweep is."""
    held = {"command": without_secrets(command_line()), "file": str(study.file.absolute()),
            "recipe": str(study.recipe.absolute()), "settings": study.settings.model_dump(mode="json"),
            "overrides": without_secrets(study.words)}  # fmt: skip
    try:
        write_text(study.root / checks.NAME, json.dumps(held, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(study.fault("output_dir", f"{study.root} cannot be written: {error.strerror}; name a folder of "
                                    "yours")) from error  # fmt: skip
    states = [trial.state for trial in every]
    parts = [f"{states.count(state)} {state}" for state in ("done", "running", "queued", "failed") if state in states]
    say(f"{study.name}: {len(every)} trials" + "".join(f", {part}" for part in parts) + f", {len(todo)} to run")
    if "failed" in states and len(todo) + states.count("done") < len(every):
        say("what failed is tried again with --retry-failed")
    if others := trials.strangers(study, every):
        say(f"left alone, runs with other settings: {', '.join(others)}")


def _run(study: Study, runner: Runner, todo: Sequence[Trial]) -> bool:
    """Run the trials; whether the sweep was told to stop."""
    for trial in todo:
        if trial.state == "failed":
            with contextlib.suppress(OSError):
                history.note(study.root, "start", trial.name)
    try:
        for ended in runner.run(todo):
            _note(study, ended)
            report = results.collect(study, _look(study, runner))
            # Whoever looks while the sweep goes on, or after it was killed, finds what is known.
            with contextlib.suppress(UserError):
                results.write(report, study.root)
            say(_told(report, ended))
            if ended.stopped:
                return True
    except KeyboardInterrupt:
        return True
    return False


def _note(study: Study, ended: Ended) -> None:
    # What becomes of the numbers of a sweep does not hang on this file: a full disk must not end it.
    with contextlib.suppress(OSError):
        history.note(study.root, "end", ended.trial.name, code=ended.code, failed=ended.failed,
                     seconds=round(ended.seconds, 3), reason=ended.reason, said=ended.said)  # fmt: skip


def _told(report: SweepReport, ended: Ended) -> str:
    from sft_dist.render.wording import duration, number

    trial = ended.trial
    if ended.code != EXIT_DONE:
        what = "failed" if ended.failed else "can go on"
        return f"{trial.name}: {what} after {duration(ended.seconds)} ({ended.reason})"
    row = next(row for row in report.rows if row.name == trial.name)
    came_to = row.reason if row.metric is None else f"{report.metric} {number(row.metric, 4)}"
    best = " (the best so far)" if row is report.best else ""
    return f"{trial.name}: done in {duration(ended.seconds)}, {came_to}{best}"


def _report(study: Study, every: Sequence[Trial], write: bool) -> None:
    report = results.collect(study, every)
    # First what cannot fail: a full disk must not keep the numbers from being seen.
    _show(report, with_results=True)
    if write:
        files = results.write(report, study.root)
        say(f"{study.root}: {', '.join(file.name for file in files)}")


def _show(report: SweepReport, with_results: bool) -> None:
    from rich.console import Console

    from sft_dist.render.sweep import to_terminal

    to_terminal(report, Console(width=None if sys.stdout.isatty() else 120, highlight=False), with_results)


def _code(states: set[State], was_stopped: bool) -> int:
    if states == {"done"}:
        return EXIT_DONE
    if was_stopped or states & {"waiting", "queued", "unfinished", "running"}:
        return EXIT_RESUMABLE
    return EXIT_BUG
