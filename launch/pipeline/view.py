"""What has become of each stage, by the files that lie there, whoever wrote them and whether they still live."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from launch.line_files import end_of
from launch.pipeline import state
from launch.pipeline.stage import Pipeline, Stage, shown
from launch.pipeline.state import Decision, Record
from launch.slurm.queue import Job
from launch.slurm.records import End, SlurmDir, read_attempts
from launch.slurm.verdict import CANCELLED
from sft_dist.errors import EXIT_DONE, EXIT_RESUMABLE, UserError
from sft_dist.runlock import living

State = Literal["pending", "queued", "running", "done", "stopped", "failed", "skipped", "stale"]
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Row:
    """A stage in the view. `seconds`: of this run so far; `about`: what made of it, or why it is in this state."""

    name: str
    kind: str
    needs: tuple[str, ...]
    state: State
    step: str
    seconds: float | None
    about: str


def rows(pipeline: Pipeline, jobs: Mapping[str, Job] | None = None) -> list[Row]:
    """A row for each stage, each behind what it needs. `jobs`: of the stages that are in Slurm's queue."""
    found: dict[str, Row] = {}
    decisions: dict[str, Decision] = {}
    stamps: dict[str, str | None] = {}
    for name, stage in pipeline.stages.items():
        fault = None
        try:
            decisions[name] = state.decide(stage, pipeline.dir, {need: stamps[need] for need in stage.needs})
        except UserError as error:
            decisions[name], fault = Decision("begin", ""), str(error)
        finished = decisions[name].action in ("done", "merge") and fault is None
        stamps[name] = state.stamp(stage) if finished else None
        found[name] = _row(stage, pipeline, decisions[name], fault, found, (jobs or {}).get(name))
    return list(found.values())


def _row(
    stage: Stage, pipeline: Pipeline, decision: Decision, fault: str | None, before: dict[str, Row], job: Job | None
) -> Row:
    record = state.read_record(pipeline.dir, stage.name)
    what, about = _state(stage, decision, record, before, job)
    if fault is not None:
        what, about = "failed", fault
    there = what not in ("pending", "queued", "skipped")
    return Row(
        name=stage.name,
        kind=stage.kind,
        needs=stage.needs,
        state=what,
        step=_step(stage) if there else "",
        seconds=_seconds(record, what) if there else None,
        about=about,
    )


def _state(
    stage: Stage, decision: Decision, record: Record | None, before: dict[str, Row], job: Job | None
) -> tuple[State, str]:
    if living(stage.folder) is not None:
        return "running", shown(stage.folder)
    if decision.action == "done":
        return "done", shown(stage.output or stage.folder)
    if job is not None:
        waits = f" ({job.reason})" if job.waits and job.reason else ""
        return "queued" if job.waits else "running", f"job {job.id}{waits}"
    if decision.action == "again":
        return "stale", decision.why
    failed = next((need for need in stage.needs if before[need].state in ("failed", "skipped")), None)
    if failed is not None:
        # What was skipped says itself because of what.
        return "skipped", before[failed].about if before[failed].state == "skipped" else f"because {failed} failed"
    if record is not None and record.code not in (None, EXIT_DONE, EXIT_RESUMABLE) and not record.stopped:
        return "failed", record.reason or f"exit code {record.code}"
    if (end := _last_end(stage)) is not None and end.verdict == "stop" and end.reason != CANCELLED:
        return "failed", end.reason
    if SlurmDir(stage.folder).submission.exists() and not SlurmDir(stage.folder).attempts.exists():
        return "pending", ""
    if decision.action == "merge":
        return "stopped", "trained; its adapter is still to be merged"
    if decision.action == "resume":
        return "stopped", f"goes on {decision.why}" if stage.trains else "begins again"
    return "pending", ""


def _last_end(stage: Stage) -> End | None:
    """How the newest attempt on Slurm ended; None where there is none, or it goes on."""
    attempts = read_attempts(SlurmDir(stage.folder))
    return attempts[-1] if attempts and isinstance(attempts[-1], End) else None


def _step(stage: Stage) -> str:
    """The newest step in the log, and how much of the training that is."""
    last = _last_record(stage)
    step = last.get("step")
    if not stage.trains or not isinstance(step, int):
        return ""
    train, epoch = stage.recipe.train, last.get("epoch")
    if stage.result.exists():
        return f"{step}"
    if train.max_steps > 0:
        return f"{step}/{train.max_steps}"
    return f"{step} ({epoch / train.num_train_epochs:.0%})" if isinstance(epoch, int | float) else f"{step}"


def _last_record(stage: Stage) -> dict[str, Any]:
    """The last whole line of the metrics; nothing where there is none."""
    with contextlib.suppress(ValueError):
        whole = end_of(stage.run.metrics, _TAIL_BYTES).rpartition(b"\n")[0].splitlines()
        last = json.loads(whole[-1]) if whole else {}
        return last if isinstance(last, dict) else {}
    return {}


def _seconds(record: Record | None, what: State) -> float | None:
    if record is None:
        return None
    if what == "running":
        since = datetime.now(UTC) - datetime.fromisoformat(record.started)
        return record.seconds + max(0.0, since.total_seconds())
    return record.seconds or None
