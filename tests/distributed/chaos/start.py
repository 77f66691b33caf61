"""One start of a run by the real command, watched from outside by what it prints."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.recipes import environment, hear_interrupts

_STEP = re.compile(r"step +(\d+)/\d+  loss ")
_GOING_ON = re.compile(r"going on from \S*/checkpoint-(\d+): step \d+")
_COMPLETE = re.compile(r"checkpoint-(\d+): [\d.]+ GB in ")
_POLL = 0.004


class Start:
    """A launcher and its ranks. Steps are read from its output, which lies on another disk than the run."""

    def __init__(self, folder: Path, log: Path, words: Sequence[str]) -> None:
        self.log = log
        self.lines: list[str] = []
        self.done = 0
        self.last_step: int | None = None
        self.from_step: int | None = None
        self._rest = ""
        self._began = time.monotonic()
        self._known: set[int] = set()
        with open(log, "wb") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "run", *words],
                cwd=folder,
                env=environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
        self._output = open(log, encoding="utf-8", errors="replace")  # noqa: SIM115

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._began

    @property
    def code(self) -> int | None:
        """As in subprocess; None while it lives."""
        return self._popen.poll()

    def look(self) -> None:
        """Read what was printed since the last look."""
        *whole, self._rest = (self._rest + self._output.read()).split("\n")
        for line in whole:
            self.lines.append(line)
            if found := _STEP.match(line):
                self.done += 1
                self.last_step = int(found[1])
            elif found := _GOING_ON.match(line):
                self.from_step = int(found[1])
            elif line.endswith(": no checkpoint yet; from the beginning"):
                self.from_step = 0

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Whether something comes to hold while it lives, within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = self.code is not None
            self.look()
            if holds():
                return True
            if ended:
                return False
            time.sleep(_POLL)
        return False

    def pause(self, seconds: float) -> bool:
        """Whether it lives for so many seconds more."""
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end, seconds + 1) and self.code is None

    def wait_for_end(self, seconds: float) -> bool:
        """Whether it ends by itself within so many seconds."""
        self.wait(lambda: False, seconds)
        return self.code is not None

    def said(self, pattern: str, since: int = 0) -> re.Match[str] | None:
        """The first line from number `since` on in which a pattern is found."""
        return next((found for line in self.lines[since:] if (found := re.search(pattern, line))), None)

    def completed(self, since: int = 0) -> int | None:
        """The step of the first checkpoint that is told to be complete from line `since` on."""
        found = next((found for line in self.lines[since:] if (found := _COMPLETE.match(line))), None)
        return int(found[1]) if found else None

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks by rank."""
        found = {}
        for pid in _children(self._popen.pid):
            if (rank := _rank(pid)) is not None:
                found[rank] = pid
                self._known.add(pid)
        return found

    def signal(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to the launcher, or to a rank; False where that has ended."""
        ranks = self.ranks()
        pid = self._popen.pid if rank is None else ranks.get(rank)
        if pid is None or self.code is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    def kill(self) -> None:
        """Kill everything."""
        for pid in (self._popen.pid, *self.ranks().values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()

    def left_alive(self, seconds: float = 10.0) -> list[int]:
        """Ranks that outlive the launcher by so many seconds."""
        end = time.monotonic() + seconds
        while (left := [pid for pid in self._known if _rank(pid) is not None]) and time.monotonic() < end:
            time.sleep(_POLL)
        return left


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _rank(pid: int) -> int | None:
    """The rank that a process is, or None for another one and one that has ended."""
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                return int(word[5:])
    return None
