"""Made-up folders of runs on Slurm, and a made-up Slurm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launch.slurm.records import (
    End,
    RankRecord,
    SlurmDir,
    Start,
    Submission,
    append_attempt,
    write_rank,
    write_submission,
)

# 2026-11-25T17:00:00Z
NOON = datetime(2026, 11, 25, 17, tzinfo=UTC).timestamp()


def iso(seconds: float) -> str:
    """So many seconds after NOON, as records and logs have it."""
    at = datetime.fromtimestamp(NOON + seconds, UTC)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def stamped(*lines: tuple[float, str]) -> str:
    """Lines of a log, each at so many seconds after NOON."""
    return "".join(f"{iso(at)} {line}\n" for at, line in lines)


class SlurmRun:
    """The folder of a run on two nodes with two ranks each."""

    def __init__(self, root: Path, job: str = "123") -> None:
        self.root, self.job, self.at = root, job, SlurmDir(root)
        (root / "logs").mkdir(parents=True, exist_ok=True)
        submission = Submission(
            job_id=job, name="opt", cluster="h100", nodes=2, tasks_per_node=2, strategy="ddp", threads=1,
            submitted=iso(-60),
            partition="gpu", time_minutes=60, requeue_max=5,
        )  # fmt: skip
        write_submission(self.at, submission)
        os.utime(self.at.submission, (NOON - 60, NOON - 60))

    def start(self, at: float, restart: int = 0, step: int = 0) -> None:
        nodes = ["n0", "n1"]
        append_attempt(self.at, Start(at=iso(at), job=self.job, restart=restart, nodes=nodes, step=step))

    def end(self, at: float, verdict: str, reason: str, restart: int = 0, code: int = 1, step: int = 0) -> None:
        record = {"at": iso(at), "job": self.job, "restart": restart, "code": code, "step": step, "verdict": verdict}
        append_attempt(self.at, End.model_validate(record | {"reason": reason}))

    def rank(
        self, rank: int, code: int | None, ended: float | None = None, restart: int = 0, stopped: bool = False
    ) -> None:
        record = RankRecord(
            rank=rank, node=f"n{rank // 2}", started=iso(0), ended=None if ended is None else iso(ended), code=code,
            stopped=stopped,
        )  # fmt: skip
        write_rank(self.at, self.job, restart, record)

    def log(self, rank: int, *lines: tuple[float, str]) -> Path:
        path = self.root / "logs" / f"rank{rank}.log"
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(stamped(*lines))
        return path

    def metrics(self, records: Sequence[Mapping[str, float]]) -> None:
        (self.root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def traceback(*last: str) -> list[str]:
    """A traceback as its lines."""
    return ["Traceback (most recent call last):", '  File "worker.py", line 7, in <module>', "    train()", *last]


def fake_command(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A command of the given name, first in PATH, that runs a shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    if not os.environ["PATH"].startswith(f"{folder}:"):
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
