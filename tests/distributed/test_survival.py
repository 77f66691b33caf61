"""A run that is told to stop, dies, hangs or meets wrong numbers: what is left, and what is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist.checkpoints import folder as folders
from tests import tiny
from tests.outcome import numbers, weights_hash
from tests.ranks import do_runs, workers_under
from tests.recipes import (
    environment,
    hear_interrupts,
    records,
    sft_dist,
    small_recipe,
    write_conversations,
)

LIMIT = 120.0
LONG = ("parallel.processes=2", "train.save_strategy=steps", "train.save_steps=5", "train.report_to=none",
        "eval.enabled=false", "train.max_steps=5000", "checkpoint.grace=40")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A run that a failed test leaves would hold up all that come after."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


class Run:
    """A run that is going on."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder / "run"
        self.log = folder / "log"
        command = [sys.executable, "-m", "launch.cli", "run", str(folder / "recipe.yaml"), *words]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(folder), stdout=log, stderr=log, preexec_fn=hear_interrupts
            )
        STARTED.append(self.process)

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.002)

    def has_done(self, steps: int) -> bool:
        return (self.folder / "metrics.jsonl").exists() and len(records(self.folder)) >= steps

    def ranks(self) -> list[int]:
        """The processes that train, by rank."""
        return workers_under(self.process.pid)

    def ends(self) -> int:
        return self.process.wait(LIMIT)

    def said(self) -> str:
        return self.log.read_text()

    def faults(self) -> list[str]:
        """The lines of the launcher and of the ranks that were meant for people."""
        return [line for line in self.said().splitlines() if line.startswith("sft-dist: ")]


def maps_of(pid: int) -> str:
    """What a process has mapped, nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def stopped_at(run: Run) -> int:
    """The step of the newest checkpoint, which is the last one that was done."""
    newest = max(folders.complete(run.folder / "checkpoints"))
    assert [row["step"] for row in records(run.folder)] == list(range(1, newest + 1))
    assert not list((run.folder / "checkpoints").glob("*.unfinished"))
    return newest


# The others are heard in the same way (tests/unit/test_stopping.py, and SIGINT below).
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2"])
def test_a_signal_saves_and_stops_at_one_step_on_all_ranks(tmp_path: Path, model: Path, number: str) -> None:
    small_recipe(tmp_path, model)
    words = ("train.eval_strategy=steps", "train.eval_steps=1") if number == "SIGTERM" else ()
    run = Run(tmp_path, *LONG, *words)
    if number == "SIGUSR2":
        # Within a save.
        run.until(lambda: bool(list((run.folder / "checkpoints").glob("*.unfinished"))))
    else:
        run.until(lambda: run.has_done(3))
    told = time.monotonic()
    run.process.send_signal(getattr(signal, number))
    assert run.ends() == 75
    assert time.monotonic() - told < 40
    step = stopped_at(run)
    assert f"sft-dist: stopped by {number} at step {step}; goes on from checkpoint-{step} with output.resume=true" in (
        run.faults()
    )
    assert "Traceback" not in run.said()


def test_a_signal_before_the_first_step_leaves_a_run_that_can_begin(tmp_path: Path, model: Path) -> None:
    small_recipe(tmp_path, model)
    run = Run(tmp_path, *LONG)
    # The libraries are being loaded.
    run.until(lambda: any("libtorch" in maps_of(rank) for rank in run.ranks()))
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 75, run.said()[-3000:]
    assert "stopped by SIGTERM outside of the training" in run.said() and "Traceback" not in run.said()
    assert not list((run.folder / "checkpoints").iterdir())


def test_an_evaluation_is_left_for_a_signal_and_made_up_for(tmp_path: Path, model: Path) -> None:
    small_recipe(tmp_path, model)
    write_conversations(tmp_path / "test.jsonl", 3000, seed=1)
    words = (*LONG, "train.eval_strategy=steps", "train.eval_steps=4", "data.max_eval_records=3000")
    run = Run(tmp_path, *words)
    run.until(lambda: run.has_done(4))
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 75
    assert stopped_at(run) == 4
    assert "eval_loss" not in (run.folder / "metrics.jsonl").read_text()
    again = Run(tmp_path, *words, "output.resume=true")
    again.until(lambda: "eval_loss" in (run.folder / "metrics.jsonl").read_text())
    again.process.send_signal(signal.SIGINT)
    again.until(lambda: "Ctrl-C again ends all processes at once" in run.said())
    again.process.send_signal(signal.SIGINT)
    assert again.ends() == 130
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert next(row["step"] for row in logged if "eval_loss" in row) == 4


def test_a_dead_rank_is_named_first_and_retries_end_with_the_same_weights(tmp_path: Path, model: Path) -> None:
    small_recipe(tmp_path, model)
    short = (*LONG, "train.max_steps=40", "train.full_determinism=true")
    run = Run(tmp_path, *short, "--retries", "2")
    run.until(lambda: run.has_done(12))
    os.kill(run.ranks()[1], signal.SIGKILL)
    died = time.monotonic()
    run.until(lambda: "starting again" in run.said())
    assert time.monotonic() - died < 15
    assert run.ends() == 0, run.said()[-3000:]
    first, *_, again = run.faults()
    assert first.startswith("sft-dist: rank 1 was killed by SIGKILL (often: out of memory)")
    assert again.startswith("sft-dist: starting again (1 of 2) from checkpoint-")
    assert [row["step"] for row in records(run.folder)] == list(range(1, 41))
    done = sft_dist(tmp_path, "run", "recipe.yaml", *short, "output.output_dir=whole")
    assert done.returncode == 0
    assert weights_hash(run.folder) == weights_hash(tmp_path / "whole")
    assert numbers(run.folder) == numbers(tmp_path / "whole")


def test_a_hanging_rank_ends_the_run_with_the_stacks_of_the_others(tmp_path: Path, model: Path) -> None:
    small_recipe(tmp_path, model)
    run = Run(tmp_path, *LONG, "guard.hang_factor=10", "guard.hang_seconds=2", "checkpoint.grace=1")
    run.until(lambda: run.has_done(12))
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.ends() == 75
    assert any("rank 0: no step has ended for " in line for line in run.faults()), run.said()[-3000:]
    stacks = (run.folder / "logs" / "stacks-rank0.txt").read_text()
    assert "resumable.py" in stacks and "Thread" in stacks
    assert max(folders.complete(run.folder / "checkpoints")) >= 10


def guarded(folder: Path, model: Path, bad: int) -> Path:
    """A recipe on like records, of which one is far from the others."""
    recipe = small_recipe(folder, model)
    lines = (folder / "train.jsonl").read_text().splitlines()
    same = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "the quick brown fox " * 8}]}
    lines = [json.dumps(same)] * 60
    odd = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "Zq9$x" * 20}]}
    lines[bad] = json.dumps(odd)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    settings = yaml.safe_load(recipe.read_text())
    settings["train"] |= {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3, "report_to": [],
                          "learning_rate": 3e-3, "per_device_train_batch_size": 1}  # fmt: skip
    settings["guard"] = {"spike_factor": 1.2, "spike_window": 2}
    settings["eval"]["enabled"] = False
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_spike_changes_no_weight_and_names_its_records(tmp_path: Path, model: Path) -> None:
    # It comes up in the ninth step.
    recipe = guarded(tmp_path, model, bad=16)
    for strategy, processes in (("single", 1), ("zero3", 2)):
        jobs = [[str(recipe), f"guard.on_spike={action}", f"output.output_dir={tmp_path / f'{strategy}-{action}'}"]
                for action in ("skip", "rollback")]  # fmt: skip
        do_runs(tmp_path, strategy, processes, jobs)
        for action in ("skip", "rollback"):
            run, alone = tmp_path / f"{strategy}-{action}", tmp_path / f"single-{action}"
            (event,) = events(run)
            step = event["step"]
            assert f"{tmp_path / 'train.jsonl'}:17" in event["samples"] and len(event["samples"]) == 4
            assert event["action"] == action and event["median"] > 0
            assert step == 9 and event["rolled_back_to"] == (6 if action == "rollback" else None)
            # Such a step is in no mean.
            assert step not in [row["step"] for row in records(run)]
            assert [row["loss"] for row in records(run)] == pytest.approx(
                [row["loss"] for row in records(alone)], rel=1e-4
            )
            assert [row["learning_rate"] for row in records(run)] == [row["learning_rate"] for row in records(alone)]
    assert numbers(tmp_path / "single-skip") != numbers(tmp_path / "single-rollback")


def test_numbers_that_are_none_stop_the_run_in_one_line(tmp_path: Path, model: Path) -> None:
    recipe = small_recipe(tmp_path, model)
    done = sft_dist(tmp_path, "run", str(recipe), "parallel.processes=2", "parallel.strategy=zero2",
                    "train.learning_rate=1e30", "train.report_to=none", "eval.enabled=false")  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sft-dist: ")]
    assert line.startswith("sft-dist: guard.nonfinite: step ") and "lower train.learning_rate" in line
    (event,) = events(tmp_path / "run")
    assert event["action"] == "stop" and len(event["samples"]) == 4
    assert "Traceback" not in done.stderr
    # Of an operation of DeepSpeed's, under a lock that outlives a killed process.
    assert "built successfully" not in done.stdout


def test_each_node_has_checkpoints_of_its_own_and_both_take_the_same(tmp_path: Path, model: Path) -> None:
    """Two nodes without a file system between them: the newest that is whole on both."""
    recipe = small_recipe(tmp_path, model)
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    words = ["train.save_strategy=steps", "train.save_steps=4", "train.report_to=none", "eval.enabled=false",
             "train.max_steps=12", "train.full_determinism=true", "train.per_device_train_batch_size=1",
             "output.output_dir=run"]  # fmt: skip
    for node in nodes:
        node.mkdir()
    do_runs(tmp_path, "zero2", 2, [[str(recipe), *words]], nodes=nodes)
    whole = weights_hash(nodes[0] / "run")
    for node in nodes:
        held = folders.complete(node / "run" / "checkpoints")
        assert sorted(held) == [4, 8, 12] and held[4].nodes == 2
        assert len([name for name in held[4].files if name.endswith(".safetensors")]) == 1
        shutil.rmtree(node / "run" / "checkpoints" / "checkpoint-12")
    shutil.rmtree(nodes[0] / "run" / "model")
    shutil.copytree(
        nodes[1] / "run" / "checkpoints" / "checkpoint-8", nodes[1] / "run" / "checkpoints" / "checkpoint-9"
    )
    damaged = next((nodes[1] / "run" / "checkpoints" / "checkpoint-8").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    do_runs(tmp_path, "zero2", 2, [[str(recipe), *words, "output.resume=true"]], nodes=nodes)
    said = "".join(log.read_text() for log in tmp_path.glob("zero2*.0.log"))
    assert f"checkpoint-8: damaged ({damaged.name} is damaged: its checksum is another)" in said
    assert "going on from run/checkpoints/checkpoint-4" in said
    assert weights_hash(nodes[0] / "run") == whole
