"""A real sweep that is stopped within a trial goes on with it, and with those behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from sft_dist.checkpoints import folder as folders
from tests.recipes import environment, hear_interrupts, records, sft_dist, small_recipe
from tests.tiny import save_model

LIMIT = 120
STEPS = 24


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, save_model(tmp_path / "model"))
    held = {
        "recipe": recipe.name,
        "output_dir": "sweep",
        "set": {"train.max_steps": STEPS, "train.save_strategy": "steps", "train.save_steps": 4, "train.report_to": [],
                "eval.num_prompts": 0},
        "parameters": {"train.learning_rate": [1e-3, 1e-2]},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(held))
    first, second = (tmp_path / "sweep" / f"trial-00{n}" for n in range(2))
    assert stopped_within(tmp_path, first) == 75
    said = (tmp_path / "log").read_text()
    assert "2 trials: 1 unfinished, 1 waiting" in said and "Traceback" not in said, said[-3000:]
    assert not second.exists()
    done = sft_dist(tmp_path, "sweep", "sweep.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial-000 (1 of 2, going on)" in done.stdout and "trial-001 (2 of 2)" in done.stdout
    assert "going on from sweep/trial-000/checkpoints/" in (first / "logs" / "rank0.log").read_text()
    for run in (first, second):
        assert [row["step"] for row in records(run)] == list(range(1, STEPS + 1))
    trials = json.loads((tmp_path / "sweep" / "results.json").read_text())["trials"]
    losses = {row["trial"]: row["eval_loss"] for row in trials}
    held_out = {run.name: json.loads((run / "summary.json").read_text())["after"]["loss"] for run in (first, second)}
    assert losses == held_out and [row["eval_loss"] for row in trials] == sorted(losses.values())


def stopped_within(folder: Path, run: Path) -> int:
    """The exit code of the sweep, which hears Ctrl-C once the run has a checkpoint."""
    command = [sys.executable, "-m", "launch.cli", "sweep", "sweep.yaml"]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=log, stderr=log, preexec_fn=hear_interrupts
        )
    try:
        end = time.monotonic() + LIMIT
        while not folders.complete(run / "checkpoints"):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        return process.wait(LIMIT)
    finally:
        process.kill()
        process.wait()
