"""`sft-dist submit --probe`: a job of a minute on nodes like those the run will have, before the run is queued."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch import logtail
from launch.slurm import submit
from launch.slurm.commands import SlurmRefused, ask, show
from launch.slurm.records import End, SlurmDir, read_attempts
from launch.slurm.submit import Job
from sft_dist.errors import UserError
from sft_dist.rundir import RunDir, command_line

_SECONDS = 30.0
_TIME = "0:05:00"
_POLL_SECONDS = 0.5
_SLOW = 0.5
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Report:
    """`pairs`: bytes per second of an all-reduce between two nodes, by their names."""

    nodes: Sequence[str]
    pairs: dict[tuple[str, str], float]

    @property
    def slow(self) -> dict[str, float]:
        """Nodes whose links have less than half the speed of the others', and how much of it."""
        found = {}
        for node in self.nodes:
            own = [speed for pair, speed in self.pairs.items() if node in pair]
            others = [speed for pair, speed in self.pairs.items() if node not in pair]
            if own and others and statistics.median(own) < _SLOW * statistics.median(others):
                found[node] = statistics.median(own) / statistics.median(others)
        return found

    def lines(self) -> list[str]:
        """What was found, for people."""
        lines = [f"probe: {len(self.nodes)} nodes see the run's folder and load the libraries"]
        if self.pairs:
            speeds = sorted((speed, pair) for pair, speed in self.pairs.items())
            median = statistics.median(self.pairs.values())
            low, (one, other) = speeds[0]
            lines.append(
                f"probe: all-reduce between two nodes: {median / 1e9:.2f} GB/s in the median of {len(speeds)} pairs, "
                f"{low / 1e9:.2f} GB/s between {one} and {other}"
            )
        for node, share in self.slow.items():
            lines.append(f"probe: {node} is slow, {share:.0%} of the others' speed; `exclude: {node}` avoids it")
        return lines


def probe(asked: Job) -> list[str]:
    """Queue the probe, wait for it, and say what it found. Raises :class:`UserError` for what would stop the run."""
    root = asked.root / "slurm" / "probe"
    output = asked.recipe.output.model_copy(update={"output_dir": str(root), "overwrite": True, "resume": False})
    profile = asked.profile.model_copy(
        update={
            "time": _TIME,
            "signal_seconds": 30,
            "requeue": asked.profile.requeue.model_copy(update={"max": 0, "in_place": False}),
        }
    )
    job = replace(
        asked,
        recipe=asked.recipe.model_copy(update={"output": output}),
        profile=profile,
        module=("sft_dist.probe", str(root.absolute()), str(_SECONDS)),
        result=root.absolute() / "probe.json",
        probes=True,
    )
    shutil.rmtree(root, ignore_errors=True)
    number = submit.submit(job, command_line()).job_id
    assert number is not None and job.result is not None
    logtail.say(
        [f"sft-dist: job {number} looks at the nodes; waiting for it (Ctrl-C gives up, nothing else is queued)"]
    )
    try:
        _wait(number)
    except KeyboardInterrupt:
        ask(["scancel", number])
        raise
    if not job.result.exists():
        raise UserError(_failure(root, number))
    return read_report(job.result).lines()


def read_report(file: Path) -> Report:
    """What the probe wrote."""
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    pairs = {(one["nodes"][0], one["nodes"][1]): float(one["bytes_per_second"]) for one in held["pairs"]}
    return Report(list(dict.fromkeys(one["node"] for one in held["ranks"])), pairs)


def _wait(number: str) -> None:
    while True:
        try:
            if show("job", number).get("JobState") in _OVER:
                return
        except SlurmRefused:
            # Slurm forgets a job some minutes after its end.
            return
        time.sleep(_POLL_SECONDS)


def _failure(root: Path, number: str) -> str:
    ends = [one for one in read_attempts(SlurmDir(root)) if isinstance(one, End)]
    why = (
        ends[-1].reason
        if ends
        else f"it never began; see {SlurmDir(root).folder}/job-{number}.out, if the node could write it"
    )
    rank = ends[-1].rank if ends else None
    log = f"; its log: {RunDir(root).logs / f'rank{rank}.log'}" if rank is not None else ""
    return f"--probe: job {number}: {why}{log}; mend that before the run is queued"
