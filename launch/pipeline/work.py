"""One stage, from what lies in its folder to its end. On a cluster it is the same work, decided when the job starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import check, local, logtail, recipe_files, retries
from launch.pipeline import state
from launch.pipeline.checks import checked, prepared
from launch.pipeline.stage import Pipeline, Stage, shown
from launch.pipeline.state import Decision, Record
from launch.pipeline.tee import Tee
from launch.processes import Ending, Rank, run_to_end
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, UserError
from sft_dist.recipe import dump_recipe
from sft_dist.rundir import write_text
from sft_dist.runlock import RunLock, refuse_if_alive

_TOLD = "told to stop"


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code, whether it was told to stop, and in words why it did not end well."""

    code: int
    stopped: bool = False
    reason: str = ""

    @property
    def resumable(self) -> bool:
        """Whether the pipeline is to stop here, and to go on at its next start."""
        return self.stopped or self.code == EXIT_RESUMABLE


@dataclass(frozen=True)
class Orders:
    """How the stages are run.

    `command`: the command line, for the record. `tries`: how often a stage that dies is started again. `heard`: whether
    the pipeline was told to stop while no process of a stage was there to hear it. `say`: tells a line.
    """

    command: Sequence[str]
    tries: int
    heard: Callable[[], bool]
    say: Callable[[str], None]


class _Stop(Exception):
    """Told to stop, before the next process of a stage was started."""


def carry_out(stage: Stage, pipeline: Pipeline, orders: Orders) -> Outcome:
    """Do what is to be done with a stage whose needs are done. Call it from the main thread.

    What goes wrong is an outcome, not an exception, for other stages may go on.
    """
    try:
        stamps = state.stamps_now(stage, pipeline)
        missing = [name for name, found in stamps.items() if found is None]
        if missing:
            raise UserError(f"{missing[0]} is not done; start the pipeline again")
        decision = state.decide(stage, pipeline.dir, stamps)
        if decision.action == "done":
            return Outcome(EXIT_DONE)
        orders.say(told(stage, decision))
        return _carry_out(stage, pipeline, decision, {n: s for n, s in stamps.items() if s}, orders)
    except UserError as error:
        return _refused(stage, error)


def told(stage: Stage, decision: Decision) -> str:
    """What is done with a stage, in a line for people."""
    if decision.action == "done":
        return f"{stage.name}: done, not run again"
    if decision.action == "begin":
        return f"{stage.name}: begins"
    if decision.action == "merge":
        return f"{stage.name}: trained; its adapter is to be merged"
    if decision.action == "resume":
        return f"{stage.name}: goes on {decision.why}" if stage.trains else f"{stage.name}: begins again"
    return f"{stage.name}: runs again, for {decision.why}"


def _carry_out(stage: Stage, pipeline: Pipeline, decision: Decision, stamps: dict[str, str], orders: Orders) -> Outcome:
    refuse_if_alive(stage.folder)
    if decision.action == "again":
        # Before anything is changed: as long as the old run lies there, its record must tell of it.
        _check(stage, decision)
        orders.say(f"{stage.name}: what was there is kept as {shown(state.set_aside(stage.folder))}")
    going_on = decision.action in ("resume", "merge")
    before = state.read_record(pipeline.dir, stage.name) if going_on else None
    record = Record(inputs=stamps, started=state.now(), seconds=before.seconds if before else 0.0)
    try:
        state.write_record(pipeline.dir, stage.name, record)
    except OSError as error:
        raise UserError(f"{pipeline.dir.record(stage.name)}: cannot be written: {error.strerror}; make room") from error
    began = time.monotonic()
    outcome = _attempt(stage, pipeline, decision, orders)
    ended = {"ended": state.now(), "code": outcome.code, "stopped": outcome.stopped, "reason": outcome.reason or None}
    ended["seconds"] = record.seconds + time.monotonic() - began
    # A full disk: what the stage left tells all but its time, and why it failed.
    with contextlib.suppress(OSError):
        state.write_record(pipeline.dir, stage.name, record.model_copy(update=ended))
    return outcome


def _attempt(stage: Stage, pipeline: Pipeline, decision: Decision, orders: Orders) -> Outcome:
    """Do the work; where only the user can mend it, the outcome has the line that says so."""
    log = pipeline.dir.log(stage.name)
    start = log.stat().st_size if log.exists() else 0
    try:
        if decision.action in ("begin", "resume"):
            _check(stage, decision)
        outcome = _work(stage, pipeline, decision, orders)
    except _Stop:
        return Outcome(EXIT_RESUMABLE, stopped=True, reason=_TOLD)
    except UserError as error:
        return _refused(stage, error)
    if outcome.code == EXIT_USER and (said := logtail.message(log, start)):
        return replace(outcome, reason=said[0].removeprefix(logtail.PREFIX).strip())
    return outcome


def _refused(stage: Stage, error: UserError) -> Outcome:
    """The first line is the reason, which whoever runs the stage tells; there may be more."""
    first, *more = str(error).splitlines()
    logtail.say(f"{logtail.PREFIX} {stage.name}: {line}" for line in more)
    return Outcome(EXIT_USER, reason=first)


def _check(stage: Stage, decision: Decision) -> None:
    check.refuse_faults(check.findings(checked(stage, decision)), unverified_too=True)


def _work(stage: Stage, pipeline: Pipeline, decision: Decision, orders: Orders) -> Outcome:
    with RunLock(stage.folder, "sft-dist pipeline"), Tee(stage.name, pipeline.dir.log(stage.name)):
        if not stage.trains:
            return _evaluate(stage, orders)
        if decision.action != "merge":
            trained = _train(prepared(stage, decision), orders)
            if trained.code != EXIT_DONE or trained.stopped:
                return trained
        if stage.merges:
            merging = merge(stage, orders)
            if merging.code != EXIT_DONE or merging.stopped:
                return merging
        if not state.is_complete(stage):
            return Outcome(1, reason="it ended well, but left no complete model")
        return Outcome(EXIT_DONE)


def _train(recipe: Recipe, orders: Orders) -> Outcome:
    endings: list[Ending] = []

    def start(file: Path, of: Recipe) -> Ending:
        _refuse_if_told(orders)
        endings.append(local.run(file, of))
        return endings[-1]

    return _outcome(Ending(retries.run(recipe, orders.command, orders.tries, start), endings[-1].stopped))


def merge(stage: Stage, orders: Orders) -> Outcome:
    """Merge the adapter into its base, complete or not at all."""
    assert stage.output is not None
    for left in stage.folder.glob(f".{stage.output.name}.unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
    print(f"merging the adapter into its base: {stage.output}", flush=True)
    return _module(orders, "sft_dist.export", str(stage.folder), "--output", str(stage.output))


def _evaluate(stage: Stage, orders: Orders) -> Outcome:
    try:
        os.makedirs(stage.folder, exist_ok=True, mode=0o700)
        write_text(stage.run.recipe, dump_recipe(stage.recipe))
    except OSError as error:
        raise UserError(f"{stage.folder} cannot be written: {error.strerror}; name another output_dir") from error
    model = recipe_files.model_folder(stage.recipe.model.model_name_or_path)
    return _module(orders, "sft_dist.evaluation", model, str(stage.run.recipe), "--output", str(stage.folder))


def _module(orders: Orders, name: str, *words: str) -> Outcome:
    """A module of the training plane, as one process that does not outlive this one."""
    _refuse_if_told(orders)
    command = [sys.executable, "-u", "-m", name, *words]
    return _outcome(run_to_end([Rank(0, command, local.base_environment(os.environ))], grace_seconds=10.0))


def _refuse_if_told(orders: Orders) -> None:
    if orders.heard():
        raise _Stop


def _outcome(ending: Ending) -> Outcome:
    reason = "" if ending.code == EXIT_DONE else f"exit code {ending.code}"
    return Outcome(ending.code, ending.stopped, _TOLD if ending.stopped else reason)
