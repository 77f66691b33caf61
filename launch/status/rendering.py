"""The status of a run, and the table of runs, for the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launch.slurm.records import seconds
from launch.status.looking import Status
from launch.status.state import restarts
from sft_dist.render.text import reveal
from sft_dist.render.wording import number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_COLOURS = {"queued": "yellow", "running": "cyan", "done": "green", "failed": "bold red", "cancelled": "magenta",
            "stopped": "yellow", "gone": "bold red"}  # fmt: skip
_BAR = 20
_LONGEST_NAME = 26
_MOST_RESTARTS = 5


def one(status: Status, console: Console) -> None:
    """A run, a fact a line."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    console.print(Text(reveal(str(status.root)), style="bold"), soft_wrap=True)
    for name, value in _facts(status):
        table.add_row(name, value)
    console.print(table)
    remarks = list(notes(status))
    if remarks:
        console.print()
    for line in remarks:
        console.print(Text(line), soft_wrap=True)


def several(statuses: Sequence[Status], console: Console) -> None:
    """Runs, one a line, that fit into 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("job", no_wrap=True)
    table.add_column("state", overflow="fold", ratio=1)
    for name in ("step", "loss", "end"):
        table.add_column(name, justify="right", no_wrap=True)
    for status in statuses:
        table.add_row(
            Text(short(status.root)),
            reveal(status.held.job_id or ""),
            _state(status, is_brief=True),
            _steps(status),
            "" if status.progress.loss is None else number(status.progress.loss, 4),
            _end(status),
        )
    console.print(table)


def notes(status: Status) -> Iterator[str]:
    """What one should know or do besides."""
    kind = status.state.kind
    if status.answer.trouble is not None:
        yield no_answer(status.answer.trouble)
    if kind in ("failed", "stopped", "cancelled", "gone") and status.checkpoint is not None:
        how = f"`sft-dist resume {reveal(str(status.root))}`" if status.held.submission else "`output.resume=true`"
        yield f"{how} goes on from checkpoint-{status.checkpoint[0]}"
    if kind in ("failed", "gone") or status.failure is not None:
        yield f"`sft-dist logs {reveal(str(status.root))}` shows more"


def no_answer(trouble: str) -> str:
    """One line about a Slurm that could not be asked."""
    text = reveal(trouble)
    return f"Slurm could not be asked, so this is what the files tell: {text if len(text) <= 120 else text[:119] + '…'}"


def short(root: Path) -> str:
    """A folder as one knows it: from here, or from home; its end, where it is long."""
    full = str(root)
    here, home = os.getcwd(), str(Path.home())
    for base, name in ((here, ""), (home, "~/")):
        if full.startswith(base.rstrip("/") + "/"):
            full = name + full[len(base.rstrip("/")) + 1 :]
            break
    full = reveal(full)
    return full if len(full) <= _LONGEST_NAME else "…" + full[1 - _LONGEST_NAME :]


def _facts(status: Status) -> Iterator[tuple[str, Text | str]]:
    from rich.text import Text

    yield "state", _state(status)
    yield from ((name, Text(text)) for name, text in _about_the_job(status))
    yield from ((name, Text(text)) for name, text in _about_the_training(status))
    if status.checkpoint is not None:
        step, at = status.checkpoint
        yield "checkpoint", Text(f"checkpoint-{step}, {_ago(status.now - at)}")
    past = restarts(status.held.history)
    for count, (at_text, step_then, reason) in enumerate(past[-_MOST_RESTARTS:]):
        name = (f"restarts {len(past)}" if len(past) > 1 else "restart") if count == 0 else ""
        yield name, Text(f"{_moment(at_text)}  step {step_then or 0:,}: {reveal(reason)}")
    if (failure := status.failure) is not None:
        where = f"rank {failure.rank} on {reveal(failure.node)}, {_moment(failure.at)}: {failure.cause}"
        yield "first error", Text(f"{where}\n{failure.summary}".strip(), style="red")


def _state(status: Status, *, is_brief: bool = False) -> Text:
    from rich.text import Text

    state = status.state
    text = Text(state.kind, style=_COLOURS[state.kind])
    if state.kind == "running":
        if state.nodes and not is_brief:
            text.append(f" on {reveal(state.nodes)}", style="default not bold")
        if state.since is not None:
            since = f" since {_clock(state.since)}" if not is_brief else ""
            text.append(f"{since} {_in_brackets(status.now - state.since, is_brief)}", style="default not bold")
        if is_brief and (quiet := status.progress.quiet_for(status.now)):
            text.append(f", silent {_rough(quiet)}", style="yellow")
    elif state.since is not None and not is_brief:
        word = "since " if state.kind == "queued" else "at "
        text.append(f" {word}{_clock(state.since)}", style="default not bold")
    if state.why:
        why = state.why if not is_brief else _briefly(status)
        text.append(f": {why}", style="default not bold")
    return text


def _about_the_job(status: Status) -> Iterator[tuple[str, str]]:
    submission, job = status.held.submission, status.answer.job
    if status.state.kind == "queued":
        begins = f"expected {_clock(seconds(status.expected))}" if status.expected else "Slurm does not know yet"
        if status.answer.trouble is None:
            yield "begins", begins
    if submission is None:
        return
    partition = (job.partition if job is not None else None) or submission.partition
    parts = [
        reveal(submission.job_id or "not numbered yet"),
        reveal(submission.name),
        f"{submission.nodes} x {submission.tasks_per_node} processes",
        f"{reveal(submission.strategy)}",
        f"partition {reveal(partition)}" if partition else "",
    ]
    yield "job", ", ".join(part for part in parts if part)
    if status.requeues:
        yield "requeued", f"{status.requeues} of at most {submission.requeue_max} times"
    if status.state.kind == "running" and job is not None and job.end is not None:
        limit = seconds(job.end)
        then = ""
        if status.ends is not None and status.ends > limit:
            then = ": the training will not be done by then, and goes on in a further job"
        yield "time limit", f"{_clock(limit)}, in {_rough(max(0.0, limit - status.now))}{then}"


def _about_the_training(status: Status) -> Iterator[tuple[str, str]]:
    now, is_running = status.progress, status.state.kind == "running"
    if now.step is None:
        if is_running:
            yield "step", "none yet"
        return
    yield "step", f"{_steps(status, with_share=True)}{_bar(now.step, now.steps)}"
    if now.epoch is not None:
        yield "epoch", f"{now.epoch:.2f}" + (f" of {now.epochs:g}" if now.epochs is not None else "")
    if now.loss is not None:
        yield "loss", number(now.loss, 4)
    if now.eval_loss is not None:
        yield "held-out", f"{number(now.eval_loss, 4)} (step {now.eval_step:,})"
    if now.tokens_per_second is not None and status.state.kind in ("running", "queued"):
        pace = f", {_step_time(now.seconds_per_step)} a step" if now.seconds_per_step else ""
        yield "tokens/s", f"{now.tokens_per_second:,.0f}{pace}"
    left = now.seconds_left
    if status.ends is not None and left == 0:
        yield "ends", "soon: all steps are done"
    elif status.ends is not None and left is not None:
        yield "ends", f"{_clock(status.ends)}, in {_rough(left)} of training"
    elif status.state.kind == "queued" and left is not None:
        yield "needs", f"{_rough(left)} more of training"
    quiet = now.quiet_for(status.now)
    if is_running and quiet is not None and now.interval is not None:
        yield "silent", f"no record for {_rough(quiet)}; one comes every {_step_time(now.interval)}"


def _steps(status: Status, *, with_share: bool = False) -> str:
    now = status.progress
    if now.step is None:
        return ""
    if not now.steps:
        return f"{now.step:,}"
    share = f" ({min(1.0, now.step / now.steps):.0%})" if with_share else ""
    return f"{now.step:,}" + (f" of {now.steps:,}{share}" if with_share else f"/{now.steps:,}")


def _bar(step: int, steps: int | None) -> str:
    if not steps:
        return ""
    done = min(_BAR, step * _BAR // steps)
    return f"  {'━' * done}{'┄' * (_BAR - done)}"


def _end(status: Status) -> str:
    if status.ends is not None:
        return f"in {_rough(status.ends - status.now)}"
    if status.state.kind != "running" and status.state.since is not None and status.state.kind != "queued":
        return _ago(status.now - status.state.since)
    return ""


def _briefly(status: Status) -> str:
    """Why, in a few words: Slurm's own for what waits, which say most to whoever has many jobs."""
    job, text = status.answer.job, status.state.why
    if status.state.kind == "queued" and job is not None and job.reason is not None:
        return reveal(job.reason.partition(",")[0].strip("()"))
    return text if len(text) <= 60 else text[:59].rstrip() + "…"


def _in_brackets(seconds_: float, is_brief: bool) -> str:
    text = _rough(max(0.0, seconds_))
    return text if is_brief else f"({text})"


def _step_time(seconds_: float) -> str:
    return f"{seconds_:.2g} s" if seconds_ < 9.5 else _rough(seconds_)


def _ago(seconds_: float) -> str:
    return f"{_rough(seconds_)} ago"


def _moment(at: str) -> str:
    """A record's time, which may be anything."""
    try:
        return _clock(seconds(at))
    except ValueError:
        return "?"


def _rough(seconds_: float) -> str:
    """A duration in one or two units, as one needs it at a glance."""
    whole = round(max(0.0, seconds_))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60} min" if hours < 48 else f"{hours // 24} d"


def _clock(at: float) -> str:
    """A time of today as an hour, of another day with its date."""
    moment = datetime.fromtimestamp(at).astimezone()
    today = datetime.now().astimezone().date()
    return f"{moment:%H:%M}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M}"
