"""Notices a training that hangs: a rank that has stopped keeps all others waiting, without end and without a word."""

from __future__ import annotations

import faulthandler
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sft_dist.config import GuardSection
from sft_dist.stopping import leave_at_once

# The first steps of a process take longer than those that follow.
_FIRST_STEPS = 3
_STEPS = 64
# Seconds for the stacks to be written.
_LATER = 0.5
_SHORTEST = 0.001


class Watchdog:
    """Ends the process when no step has ended for `hang_factor` times the median step, and writes its stacks.

    A batch of an evaluation is watched as a step is, its time is not. What is no step (reading data, a save that is
    waited for, compilation) is not counted.
    """

    def __init__(self, settings: GuardSection, stacks: Path, rank: int) -> None:
        self._factor, self._least = settings.hang_factor, settings.hang_seconds
        self._stacks, self._rank = stacks, rank
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._ended = 0
        self._since: float | None = None
        self._paused = 0
        self._lost = 0.0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def start(self) -> None:
        """Begin to watch, before the first step."""
        if self._factor is None or self._thread is not None:
            return
        self._watch_compilation()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        with self._wake:
            self._since = None
            self._thread = None
            self._wake.notify()
        self._disarm()
        if self._file is not None:
            self._file.close()
            self._file = None
            with suppress(OSError):
                if not self._stacks.stat().st_size:
                    self._stacks.unlink()

    def step_ended(self) -> None:
        """Count a step, and wait for the next."""
        with self._wake:
            now = time.monotonic()
            if self._since is not None and self._ended >= _FIRST_STEPS:
                self._durations.append(now - self._since + self._lost)
            self._ended += 1
            self._since, self._lost = now, 0.0
            self._wake.notify()
        self._arm()

    def sign_of_life(self) -> None:
        """Count anew from now: between two steps something else was done."""
        with self._wake:
            if self._since is None:
                return
            self._since, self._lost = time.monotonic(), 0.0
            self._wake.notify()
        self._arm()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no step."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    @property
    def limit(self) -> float | None:
        """Seconds of the longest step, or None while there is none to compare with."""
        if self._factor is None or len(self._durations) < _FIRST_STEPS:
            return None
        return max(self._least, self._factor * statistics.median(self._durations))

    def _pause(self) -> None:
        with self._wake:
            self._paused += 1
            if self._paused == 1 and self._since is not None:
                self._lost += time.monotonic() - self._since
            self._wake.notify()
        self._disarm()

    def _go_on(self) -> None:
        with self._wake:
            self._paused -= 1
            if not self._paused and self._since is not None:
                self._since = time.monotonic()
            self._wake.notify()
        self._arm()

    def _watch_compilation(self) -> None:
        import torch

        with suppress(ImportError, AttributeError):
            callbacks = torch._dynamo.callback
            callbacks.on_compile_start(lambda *_: self._pause())
            callbacks.on_compile_end(lambda *_: self._go_on())

    def _arm(self) -> None:
        """Have the stacks written even if a call into C never gives Python's lock back."""
        if self.limit is None or self._paused or self._thread is None:
            return
        if self._file is None:
            with suppress(OSError):
                self._stacks.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._stacks, "a", encoding="utf-8")  # noqa: SIM115
        if self._file is not None:
            # The step may have begun before a pause; the thread that ends the process counts that, too.
            faulthandler.dump_traceback_later(max(self.limit - self._lost, _SHORTEST), file=self._file)

    def _disarm(self) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        me = threading.current_thread()
        while True:
            with self._wake:
                if self._thread is not me:
                    return
                limit, since = self.limit, self._since
                if limit is None or since is None or self._paused:
                    self._wake.wait()
                    continue
                left = since + limit + _LATER - time.monotonic() - self._lost
                if left > 0:
                    self._wake.wait(left)
                    continue
            leave_at_once(
                f"rank {self._rank}: no step has ended for {limit:.0f} s, the median of the steps before is "
                f"{statistics.median(self._durations):.2f} s (guard.hang_factor); stacks in {self._stacks}"
            )
