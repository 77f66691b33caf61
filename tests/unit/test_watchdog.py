"""A training that hangs ends, with the stacks of all its threads; one that does something else does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist.config import GuardSection
from sft_dist.errors import EXIT_RESUMABLE
from sft_dist.trainers import watchdog
from sft_dist.trainers.watchdog import Watchdog
from tests.recipes import ROOT

PATIENCE = 60.0


class Looks(threading.Condition):
    """Tells how long the thread means to wait; it looks again only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float | None] = []
        self._changed = threading.Condition()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            self.asked.append(timeout)
            self._changed.notify_all()
        return super().wait()

    def next(self, before: int) -> float | None:
        """How long the thread means to wait, after a look later than so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) > before, PATIENCE)
            return self.asked[-1]


class Watched:
    """A watchdog with a clock that is set by hand."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.now = 1000.0
        self.ended: list[str] = []
        self.armed: list[float] = []
        self.over, self.test_is_over = threading.Event(), threading.Event()
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watchdog, "leave_at_once", self._leave)
        monkeypatch.setattr(
            watchdog,
            "faulthandler",
            SimpleNamespace(
                dump_traceback_later=lambda seconds, file: self.armed.append(seconds),
                cancel_dump_traceback_later=lambda: self.armed.append(0.0),
            ),
        )
        monkeypatch.setattr(Watchdog, "_watch_compilation", lambda _: None)
        section = GuardSection.model_validate({"hang_factor": 10, "hang_seconds": 5, **settings})
        self.dog = Watchdog(section, folder / "logs" / "stacks.txt", rank=3)
        self.looks = Looks()
        self.dog._wake = self.looks

    def _leave(self, message: str) -> None:
        self.ended.append(message)
        self.over.set()
        self.test_is_over.wait()

    def look(self) -> float | None:
        """Have the thread look, and give how long it means to wait then."""
        before = len(self.looks.asked)
        with self.looks:
            self.looks.notify()
        return self.looks.next(before)

    def steps(self, *seconds: float) -> None:
        for each in seconds:
            self.now += each
            self.dog.step_ended()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(**settings: Any) -> Watched:
        made.append(Watched(tmp_path, monkeypatch, **settings))
        made[-1].dog.start()
        return made[-1]

    yield make
    for each in made:
        each.dog.stop()
        each.test_is_over.set()


def test_the_limit_is_a_multiple_of_the_median_and_no_less_than_the_least(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(500, 400, 300)  # the first ones are not counted
    assert found.dog.limit is None
    found.steps(2, 3)
    assert found.dog.limit is None
    found.steps(1)
    assert found.dog.limit == 20.0
    found.steps(0.1, 0.1, 0.1, 0.1)
    assert found.dog.limit == 5.0
    # The steps that count are the latest ones.
    found.steps(*[7.0] * 64)
    assert found.dog.limit == 70.0


def test_a_step_that_does_not_end_is_a_hang(watched: Callable[..., Watched], tmp_path: Path) -> None:
    found = watched()
    found.steps(*[2.0] * 6)
    assert found.look() == pytest.approx(20.5)
    assert found.armed[-1] == 20.0
    found.now += 20.4
    assert found.look() == pytest.approx(0.1)
    found.now += 0.2
    with found.looks:
        found.looks.notify()
    assert found.over.wait(PATIENCE)
    (line,) = found.ended
    assert line == (
        "rank 3: no step has ended for 20 s, the median of the steps before is 2.00 s (guard.hang_factor); stacks in "
        f"{tmp_path}/logs/stacks.txt"
    )


def test_each_step_that_ends_begins_the_time_anew(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(*[2.0] * 6)
    for _ in range(5):
        found.steps(19.0)
        assert found.look() == pytest.approx(found.dog.limit + 0.5)  # type: ignore[operator]
    assert not found.ended


def test_the_first_steps_may_take_any_time(watched: Callable[..., Watched]) -> None:
    found = watched()
    for _ in range(5):
        found.now += 1e6
        assert found.look() is None
        found.steps(1.0)
    assert not found.ended and not found.armed


def test_what_is_no_step_may_take_any_time(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(*[2.0] * 6)
    found.now += 1.5
    with found.dog.paused():
        assert found.armed[-1] == 0.0
        found.now += 1e6
        assert found.look() is None
        with found.dog.paused():
            found.now += 1e6
            assert found.look() is None
        assert found.look() is None and found.armed[-1] == 0.0
    # Of this step 1.5 s are over, for the end of the process and for the stacks, which come first.
    assert found.look() == pytest.approx(20.5 - 1.5)
    assert found.armed[-1] == pytest.approx(20.0 - 1.5)
    found.now += 18.0
    assert found.look() == pytest.approx(1.0)
    found.now += 1.1
    with found.looks:
        found.looks.notify()
    assert found.over.wait(PATIENCE)


def test_a_pause_is_no_part_of_a_steps_time(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(1, 1, 1)
    for _ in range(3):
        found.now += 2.0
        with found.dog.paused():
            found.now += 300.0
        found.now += 3.0
        with found.dog.paused():
            found.now += 7.0
        found.dog.step_ended()
    assert found.dog.limit == 50.0


def test_an_exception_ends_a_pause(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(*[2.0] * 6)
    with pytest.raises(KeyError), found.dog.paused():
        raise KeyError
    assert found.look() == pytest.approx(20.5)


def test_it_ends_with_the_training(watched: Callable[..., Watched]) -> None:
    found = watched()
    found.steps(*[2.0] * 6)
    thread = found.dog._thread
    assert thread is not None and thread.is_alive() and thread.daemon
    found.dog.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive() and found.armed[-1] == 0.0
    armed = list(found.armed)
    found.now += 1e6
    found.dog.step_ended()
    with found.dog.paused():
        pass
    assert not found.ended and set(found.armed[len(armed) :]) <= {0.0}


def test_switched_off_it_watches_nothing(watched: Callable[..., Watched]) -> None:
    found = watched(hang_factor=None)
    found.steps(*[2.0] * 10)
    assert found.dog._thread is None and found.dog.limit is None and not found.armed


def test_a_folder_that_cannot_be_written_keeps_no_hang(watched: Callable[..., Watched], tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    found = watched()
    found.steps(*[2.0] * 6)
    assert not found.armed
    found.now += 1e6
    with found.looks:
        found.looks.notify()
    assert found.over.wait(PATIENCE)


# Steps, and then what does not end; the folder is the first word.
PROGRAM = """
import sys, threading
from pathlib import Path
from sft_dist.config import GuardSection
from sft_dist.trainers.watchdog import Watchdog

dog = Watchdog(GuardSection(hang_factor=2, hang_seconds=0.2), Path(sys.argv[1]) / "stacks.txt", 1)
dog._watch_compilation = lambda: None
dog.start()
for _ in range(7):
    dog.step_ended()

def waits_for_other_ranks():
    print("hangs", flush=True)
    never = threading.Lock()
    never.acquire()
    never.acquire()

threading.Thread(target=lambda: threading.Event().wait(), name="loader", daemon=True).start()
{then}
"""


def ran(
    folder: Path, then: str, first: str = "dog._watch_compilation = lambda: None"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then), str(folder)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    done = ran(tmp_path, "waits_for_other_ranks()")
    assert done.returncode == EXIT_RESUMABLE == 75, done.stderr
    assert done.stdout == "hangs\n"
    assert re.fullmatch(
        r"sft-dist: rank 1: no step has ended for 0 s, the median of the steps before is 0\.00 s \(guard\.hang_factor\)"
        rf"; stacks in {re.escape(str(tmp_path))}/stacks\.txt; goes on from its newest checkpoint\n",
        done.stderr,
    )
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "in waits_for_other_ranks" in stacks and "most recent call first" in stacks
    assert "in wait" in stacks  # of the other threads, too


def test_after_a_pause_in_a_step_there_are_stacks_too(tmp_path: Path) -> None:
    """They are written before the process ends, however much of the step was over when it paused."""
    (tmp_path / "stacks.txt").write_text("of an earlier hang\n")
    then = """
dog._least = 1.0
dog._since -= 0.75
with dog.paused():
    pass
waits_for_other_ranks()
"""
    done = ran(tmp_path, then)
    assert done.returncode == EXIT_RESUMABLE, done.stderr
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "in waits_for_other_ranks" in stacks
    assert stacks.startswith("of an earlier hang\n")


def test_a_compilation_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = pytest.importorskip("torch._dynamo.callback")
    handler = callback.callback_handler
    for kind in ("start_callbacks", "end_callbacks"):
        monkeypatch.setattr(handler, kind, [])
    dog = Watchdog(GuardSection(), tmp_path / "stacks.txt", 0)
    dog._watch_compilation()
    # One that begins while another lasts is the same pause.
    with handler.install_callbacks(callback.CallbackTrigger.DYNAMO, "0/0"):
        assert dog._paused == 1
        with handler.install_callbacks(callback.CallbackTrigger.DYNAMO, "0/1"), dog.paused():
            assert dog._paused == 2
        assert dog._paused == 1
    assert dog._paused == 0
