"""A file system that is slow or away: the training goes on, says so, and stops when it has been so for too long."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.checkpoints import writer
from sft_dist.checkpoints.keeper import Keeper
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.checkpoints.states import PlainStates
from sft_dist.config import CheckpointSection, GuardSection
from sft_dist.stopping import Stopped, StopRequests
from sft_dist.survival import Survival
from sft_dist.trainers.guard import Guard
from sft_dist.trainers.watchdog import Watchdog

ABOUT = Manifest(0, 0, 0, 1, "single", 2, "hash", "data")


class Training:
    """A survival around a tiny model; `away` is set while the file system gives no answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.said: list[str] = []
        self.back = threading.Event()
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        section = CheckpointSection.model_validate({"grace": 0.05, "max_failures": 2, **settings})
        self.keeper = Keeper(folder / "checkpoints", section, 0, self.said.append)
        watchdog = Watchdog(GuardSection(), folder / "stacks.txt", 0)
        requests = StopRequests([], section.grace)
        self.survival = Survival(
            self.keeper, requests, Guard(GuardSection()), watchdog, ABOUT, folder / "events.jsonl", self.said.append
        )
        write = writer.write_tensors

        def slow(*args: Any) -> Any:
            assert self.back.wait(60)
            return write(*args)

        monkeypatch.setattr(writer, "write_tensors", slow)

    def save(self, step: int) -> bool:
        """What the trainer does at a step that is saved."""
        if not self.survival.may_save(step):
            return False
        about = self.survival.about(step, tokens=step, trained_tokens=step, metrics={})
        self.keeper.save(about, PlainStates(self.model, self.optimizer, 0, 1), {}, {}, {})
        return True


def test_a_save_that_hangs_holds_nothing_up_but_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, monkeypatch)
    assert training.save(4)
    assert not training.survival.end_step(5)
    assert not training.save(8)
    (line,) = training.said
    assert line.startswith("checkpoint-8: not written (checkpoint-4 is still being written); the training goes on and")
    assert line.endswith("(failure 1 of 2)")
    assert not training.survival.end_step(9)
    assert not training.save(12)
    assert training.said[-1].endswith("(checkpoint-4 is still being written); the run stops (failure 2 of 2)")
    with pytest.raises(Stopped, match=r"checkpoint.max_failures: 2 checkpoints in a row could not be written"):
        training.survival.end_step(13)
    training.back.set()
    assert training.keeper.wait(60)


def test_one_that_was_slow_counts_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch)
    assert training.save(4) and not training.save(8)
    training.back.set()
    assert training.keeper.wait(60)
    assert training.save(12)
    assert training.keeper.wait(60)
    assert not training.survival.end_step(13)
    assert training.keeper.failures == 0 and training.keeper.newest == 12


def test_no_time_left_is_no_save_and_the_newest_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, monkeypatch)
    training.back.set()
    assert training.save(4) and training.keeper.wait(60)
    training.keeper.look()
    assert training.survival.time_to_save(6)
    training.keeper.slowest = 5.0
    assert not training.survival.time_to_save(6)
    assert training.said[-1] == "checkpoint-6: no time left to write it (the last one took 5 s)"
    training.survival.stopping = "SIGTERM"
    with pytest.raises(Stopped, match=r"stopped by SIGTERM at step 6; goes on from checkpoint-4 with "):
        training.survival.stop(6)
