"""Signals that ask a run to stop: heard at once, obeyed at the next step that all ranks have done.

Python runs a signal's handler between two of its own instructions, and a rank that waits for others in a collective
comes to none. The number of a signal is therefore read from the pipe that Python writes it to at once, by a thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from sft_dist.errors import EXIT_RESUMABLE

_AT_ONCE = 130
_LOOK_UP = 1.0  # seconds between two looks at whether a parent is still there


class Stopped(BaseException):
    """The run ends here and can go on from its newest checkpoint. The message is a line for people.

    `agreed`: all ranks raise it at the same place. No library that catches exceptions is to catch it.
    """

    def __init__(self, message: str, agreed: bool) -> None:
        super().__init__(message)
        self.agreed = agreed


class StopRequests:
    """Listens for signals from when it is entered. To be used in the main thread.

    Outside of the training, where there is nothing to save, a signal raises :class:`Stopped`. Within it the signal is
    only noted. `grace` seconds after the first one the process ends in any case, with the code for a run that can go
    on. A second SIGINT ends it at once. `to_the_end`: after a stop nothing is heard any more, for Slurm and a launcher
    may both send what ends the run, and the later one must not make another exit code of it.
    """

    def __init__(self, names: Sequence[str], grace: float, to_the_end: bool = False) -> None:
        self._numbers = [signal.Signals[name] for name in names]
        self._grace = grace
        self._to_the_end = to_the_end
        self.number = 0
        self._at = 0.0
        self.within_training = False

    def __enter__(self) -> StopRequests:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in self._numbers}
        os.register_at_fork(before=self._before_fork, after_in_child=self._in_child)
        threading.Thread(target=self._listen, name="stop-requests", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        deaf = self._to_the_end and kind is not None and issubclass(kind, Stopped)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if deaf else handler)
        self._before = {}
        # The end of the pipe ends the thread.
        os.close(self._write)

    @property
    def name(self) -> str:
        """The name of the signal that was heard."""
        return signal.Signals(self.number).name if self.number else "a signal on another rank"

    @property
    def seconds_left(self) -> float:
        """Of the grace."""
        return max(0.0, self._at + self._grace - time.monotonic()) if self.number else self._grace

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._note(number)
        if not self.within_training:
            raise Stopped(f"stopped by {self.name} outside of the training; nothing had to be saved", agreed=False)

    def _note(self, number: int) -> None:
        if not self.number:
            self._at = time.monotonic()
            self.number = number
            timer = threading.Timer(self._grace, self._end)
            timer.daemon = True
            timer.start()

    def _listen(self) -> None:
        interrupts = 0
        while content := os.read(self._read, 64):
            for number in content:
                if number not in self._numbers:
                    continue
                self._note(number)
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    os._exit(_AT_ONCE)
        os.close(self._read)

    def _end(self) -> None:
        if self._before:
            leave_at_once(f"{self.name}: no step ended within checkpoint.grace ({self._grace:g} s)")

    def _before_fork(self) -> None:
        # The child that asks for its parent may be too late for the answer.
        self._forking = os.getpid()

    def _in_child(self) -> None:
        """A process that loads data is stopped by its parent, which needs it up to the last step."""
        if self._before and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
            if signal.SIGTERM in self._before and hasattr(signal, "sigtimedwait"):
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                threading.Thread(target=_obey, args=(self._forking,), name="obey-parent", daemon=True).start()


def _obey(parent: int) -> None:
    """End this process at a SIGTERM of its parent's, or when that is gone.

    Slurm sends one to every process of a job that it takes down. Two that come at once are one, of which it may be
    the parent's that is lost.
    """
    while os.getppid() == parent:
        heard = signal.sigtimedwait({signal.SIGTERM}, _LOOK_UP)
        if heard is not None and heard.si_pid in (parent, os.getpid()):
            break
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def leave_at_once(message: str) -> None:
    """End this process as one of a run that can go on, whatever its threads are waiting for."""
    print(f"sft-dist: {message}; goes on from its newest checkpoint", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_RESUMABLE)
