"""A run that is killed and resumed is one run in its log and in the trackers, each step once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.ranks import workers_under
from tests.recipes import environment, records, sft_dist, small_recipe
from tests.wandb_files import handed_over

STEPS = 24
LIMIT = 90.0  # seconds


def logged(run: Path) -> list[int]:
    """Steps in `metrics.jsonl`, of which the last line may be in the making."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row["step"] for line in lines if "loss" in (row := json.loads(line))]


def rank_of(launcher: int) -> int:
    """The process that trains, of a launcher with one rank."""
    (rank,) = workers_under(launcher)
    return rank


def kill_beyond_a_checkpoint(folder: Path, recipe: Path, run: Path) -> int:
    """Start a run and kill the process that trains; returns the step of its newest checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", str(recipe)], cwd=folder, env=environment(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until = time.monotonic() + LIMIT
    while max(logged(run), default=0) < 7:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.005)
    os.kill(rank_of(process.pid), signal.SIGKILL)
    process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert max(logged(run)) < STEPS
    return max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*"))


def steps_of(rows: list[dict[str, Any]], key: str) -> list[int]:
    return [int(row["_step"]) for row in rows if key in row]


def test_a_killed_run_goes_on_as_one_run_in_every_log(tmp_path: Path) -> None:
    recipe, run = small_recipe(tmp_path, tiny.save_model(tmp_path / "base")), tmp_path / "run"
    settings = yaml.safe_load(recipe.read_text())
    settings["train"] |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 6}
    settings["eval"]["num_prompts"] = 1
    recipe.write_text(yaml.safe_dump(settings))
    newest = kill_beyond_a_checkpoint(tmp_path, recipe, run)
    done = sft_dist(tmp_path, "run", str(recipe), "output.resume=true")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"step {newest + 1:>2}/{STEPS}" in done.stdout and f"step {newest:>2}/{STEPS}" not in done.stdout

    every, evaluated = list(range(1, STEPS + 1)), list(range(6, STEPS + 1, 6))
    assert [row["step"] for row in records(run)] == every

    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    starts = [handed_over(file) for file in files]
    assert {name for name, _ in starts if name} == {json.loads((run / "tracker.json").read_text())["wandb_run_id"]}
    rows = [row for _, rows in starts for row in rows]
    assert steps_of(rows, "_step") == [0, *every]
    assert steps_of(rows, "train/loss") == every
    assert steps_of(rows, "eval/loss") == evaluated
    assert [row["train/loss"] for row in rows if "train/loss" in row][:newest] == [row["loss"] for row in records(run)][
        :newest
    ]

    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == every
    assert [event.step for event in shown.Scalars("eval/loss")] == evaluated
    assert Counter(event.step for event in shown.Scalars("train/before_loss")) == {0: 1}
