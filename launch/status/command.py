"""`sft-dist status [RUN]`: one run closely, or all of this user's at a glance."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.logs.places import run_folder
from launch.slurm import queue, registry
from launch.slurm.commands import SlurmDown
from launch.slurm.queue import Answer, Job
from launch.slurm.records import seconds
from launch.status import looking, rendering
from launch.status import state as states
from launch.status.looking import Status
from sft_dist.errors import EXIT_DONE, UserError
from sft_dist.render.text import reveal
from sft_dist.render.wording import count

# In the table; each costs the reading of its files.
_MOST_RUNS = 50


def show(name: str | None, *, as_json: bool, forget: bool = False) -> int:
    """Print it. Returns the exit code. Raises :class:`UserError` for what is no run."""
    if name is not None and forget:
        raise UserError("--forget: drops all folders that are gone; leave RUN out")
    return _one(name, as_json) if name is not None else _all(as_json, forget)


def _one(name: str, as_json: bool) -> int:
    status = looking.look(run_folder(name))
    if as_json:
        return _print_json(looking.to_json(status))
    console = _console()
    with console.capture() as printed:
        rendering.one(status, console)
    _print(_stripped(printed.get()))
    return EXIT_DONE


def _all(as_json: bool, forget: bool) -> int:
    forgotten = _forget() if forget else []
    jobs: Sequence[Job] = []
    trouble = None
    try:
        jobs = queue.mine()
    except SlurmDown as error:
        trouble = str(error)
    roots, gone, older = _roots(jobs)
    statuses = sorted((_glance(root, jobs, trouble) for root in roots), key=_newest, reverse=True)
    remarks = [*_remarks(statuses, gone, older, trouble), *(f"forgotten: {reveal(str(root))}" for root in forgotten)]
    if as_json:
        runs = [looking.to_json(status) for status in statuses]
        return _print_json({"runs": runs, "gone": [str(root) for root in gone], "slurm": trouble})
    console = _console()
    with console.capture() as printed:
        if statuses:
            rendering.several(statuses, console)
        if statuses and remarks:
            console.print()
        for line in remarks:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print(_stripped(printed.get()))
    return EXIT_DONE


def _roots(jobs: Sequence[Job]) -> tuple[list[Path], list[Path], int]:
    """The folders of runs, each once, those that are not there, and how many older ones are left out."""
    remembered = registry.read()
    queued = [job.run for job in jobs if job.run is not None]
    known = dict.fromkeys([*remembered[-_MOST_RUNS:], *queued])
    there = {root: None for root in known if root.is_dir()}
    return list(there), [root for root in known if root not in there], len({*remembered} - {*known})


def _glance(root: Path, jobs: Sequence[Job], trouble: str | None) -> Status:
    held = states.read(root)
    job = next((each for each in jobs if each.id == held.job_id), None)
    if job is None:
        job = next((each for each in jobs if held.job_id is None and each.run == root), None)
    return looking.glance(held, Answer(job, trouble))


def _newest(status: Status) -> float:
    submission = status.held.submission
    try:
        return seconds(submission.submitted) if submission is not None else 0.0
    except ValueError:
        return 0.0


def _remarks(statuses: Sequence[Status], gone: Sequence[Path], older: int, trouble: str | None) -> list[str]:
    lines = []
    if not statuses:
        lines.append("no runs on Slurm are known here; `sft-dist status RUN` shows the one in a folder")
    if trouble is not None and statuses:
        lines.append(rendering.no_answer(trouble))
    if older:
        lines.append(f"{count(older, 'older run')} left out; `sft-dist status RUN` shows it")
    if gone:
        names = ", ".join(reveal(str(root)) for root in gone[:3]) + (", ..." if len(gone) > 3 else "")
        what = "a folder that is" if len(gone) == 1 else f"{len(gone)} folders that are"
        lines.append(f"{what} gone, or not mounted here: {names}; `sft-dist status --forget` drops them")
    return lines


def _forget() -> list[Path]:
    try:
        return registry.forget_gone()
    except OSError as error:
        raise UserError(f"{registry.path()}: cannot be written: {error.strerror}; mend its permissions") from error


def _console() -> Any:
    from rich.console import Console

    from sft_dist.render.text import tolerate_encoding

    console = Console(width=None if sys.stdout.isatty() else 80)
    tolerate_encoding(console)
    return console


def _stripped(text: str) -> str:
    """Without the blanks that fill a column up."""
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def _print_json(held: dict[str, Any]) -> int:
    _print(json.dumps(_finite(held), indent=2) + "\n")
    return EXIT_DONE


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Whoever reads, such as head, has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
