"""A pipeline whose processes are killed goes on where it was, and ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sft_dist.runlock import FILE_NAME
from tests import tiny
from tests.outcome import numbers, weights_hash
from tests.ranks import do_runs
from tests.recipes import command, environment, small_recipe

# As those of the run that it is compared with: sums over other threads may have other bits.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PIPELINE = """\
output_dir: out
stages:
  first: {recipe: recipe.yaml, set: {train.max_steps: 2}}
  second:
    recipe: recipe.yaml
    model: ${stages.first.output}
    set: {train.max_steps: 16, train.save_strategy: steps, train.save_steps: 2}
  measure: {kind: eval, model: "${stages.second.output}"}
"""
WORDS = [f"{stage}.{word}" for stage in ("first", "second")
         for word in ("eval.enabled=false", "train.report_to=none", "train.full_determinism=true")]  # fmt: skip


def test_a_chain_that_is_killed_goes_on_and_has_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    (tmp_path / "p.yaml").write_text(PIPELINE)
    second = tmp_path / "out" / "second"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pipeline", "p.yaml", *WORDS],
        cwd=tmp_path,
        env=environment(tmp_path) | ONE_THREAD,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: bool(list(second.glob("checkpoints/checkpoint-*[0-9]"))))
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    wait_for(lambda: not workers_of(second))
    before = (tmp_path / "out" / "first" / "summary.json").stat().st_mtime_ns
    shown = pipeline(tmp_path, "--status").stdout
    assert "✔ done" in shown and "‖ stopped" in shown and "goes on from checkpoint-" in shown
    assert not (second / "model").exists() and (second / FILE_NAME).exists()

    again = pipeline(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "sft-dist:   first: done, not run again" in again.stdout
    assert "second | going on from" in again.stdout and "first | " not in again.stdout
    assert (tmp_path / "out" / "first" / "summary.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "measure" / "measure.json").exists()

    left_alone(tmp_path)
    for stage in ("first", "second"):
        ours, alone = tmp_path / "out" / stage, tmp_path / f"alone-{stage}"
        assert weights_hash(ours) == weights_hash(alone), stage
        assert numbers(ours) == numbers(alone), stage


def pipeline(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the pipeline of the test."""
    return command(folder, sys.executable, "-m", "launch.cli", "pipeline", "p.yaml", *WORDS, *words, **ONE_THREAD)


def left_alone(folder: Path) -> None:
    """The same two trainings without a pipeline and without interruption, in one process."""
    recipes = folder / "out" / "pipeline" / "recipes"
    jobs = [
        [str(recipes / "first.yaml"), f"output.output_dir={folder / 'alone-first'}"],
        [
            str(recipes / "second.yaml"),
            f"output.output_dir={folder / 'alone-second'}",
            f"model.model_name_or_path={folder / 'alone-first' / 'model'}",
        ],
    ]
    do_runs(folder, "single", 1, jobs)


def workers_of(run: Path) -> list[str]:
    """The processes that train in a folder."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path("/proc", entry, "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(run / "recipe.yaml") in line:
                found.append(line)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
