"""Starting the processes of a run, passing signals on to them, and ending all of them when one fails.

Every rank is a session of its own, so that Ctrl-C in the terminal reaches the launcher only, which passes it
on once; accelerate's launcher does not pass on SIGUSR1 and SIGUSR2 and turns every exit code into 1. The
launcher sleeps until a signal arrives (SIGCHLD among them) or a deadline passes.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from launch import logtail
from sft_dist.errors import EXIT_RESUMABLE, EXIT_USER, UserError

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FORWARDED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)
# Between SIGTERM and SIGKILL for the ranks that outlive a failure: most hang in a collective with the dead.
_FAILURE_GRACE_SECONDS = 5.0
# A fault of the user's is found by all ranks; the others are given the time to say so themselves.
_SAME_FAULT_SECONDS = 2.0
_SAME_STOP_SECONDS = 15.0
_TETHER = Path(__file__).resolve().with_name("tether.py")


@dataclass(frozen=True)
class Rank:
    """One process of a run. Its output goes to `log_path` (appended, mode 0600), or to the terminal if None."""

    rank: int
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank}"


@dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code, and whether it had been told to stop by a signal to the launcher."""

    code: int
    stopped: bool


def run_ranks(
    ranks: Sequence[Rank], *, grace_seconds: float = 30.0, stop_signals: Collection[signal.Signals] = ()
) -> int:
    """Run all ranks to their end and return the exit code of the run; see `run_to_end`."""
    return run_to_end(ranks, grace_seconds=grace_seconds, stop_signals=stop_signals).code


def run_to_end(
    ranks: Sequence[Rank], *, grace_seconds: float = 30.0, stop_signals: Collection[signal.Signals] = ()
) -> Ending:
    """Run all ranks to their end. To be called from the main thread.

    The code is that of the first rank that failed (128 + number for a death by signal), 0 if none did. A run
    that was told to stop is resumable (75) if a rank says so, however the others died; a second Ctrl-C kills
    all ranks and gives 130. After a signal to stop, ranks have `grace_seconds` before they are killed; SIGINT, SIGTERM
    and SIGHUP are such signals, and those of `stop_signals`. Any other signal is only passed on.
    When this returns no process of the run is left, and none is when the launcher itself is killed.
    Raises :class:`UserError` when a log cannot be written or a command cannot be started.
    """
    with _Signals() as signals, _Keeper() as keeper:
        run = _Run(grace_seconds, keeper, {*_ENDING, *stop_signals})
        try:
            for rank in ranks:
                run.start(rank)
            while run.alive:
                for number in signals.wait(run.patience()):
                    run.on_signal(number)
                run.reap()
                run.on_time()
        finally:
            run.kill()
    run.pass_on_messages()
    return Ending(run.exit_code(), run.stopped)


class _Run:
    """The processes of a run and what has become of them."""

    def __init__(self, grace_seconds: float, keeper: _Keeper, ending: Collection[int]) -> None:
        self.alive: list[_Process] = []
        self._ended: list[_Process] = []
        self._failed: list[_Process] = []
        self._grace = grace_seconds
        self._keeper = keeper
        self._ending = ending
        self._stopped_by: int | None = None
        self._killed_by_user = False
        self._terminate_at = math.inf
        self._kill_at = math.inf

    def start(self, rank: Rank) -> None:
        process = _Process(rank)
        self.alive.append(process)
        self._keeper.watch(process.pid)

    def patience(self) -> float | None:
        """Seconds until the next deadline, or None when there is none."""
        due = min(self._terminate_at, self._kill_at)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def on_signal(self, number: int) -> None:
        if number not in _FORWARDED:
            return
        if number == signal.SIGINT and self._stopped_by == signal.SIGINT:
            self._killed_by_user = True
            self._kill_at = 0.0
            return
        for process in self.alive:
            process.signal(number)
        if number in self._ending:
            if number == signal.SIGINT:
                logtail.say(["sft-dist: stopping; Ctrl-C again ends all processes at once"])
            self._stopped_by = number if number == signal.SIGINT else self._stopped_by or number
            self._kill_at = min(self._kill_at, time.monotonic() + self._grace)

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._stopped_by is not None

    def on_time(self) -> None:
        now = time.monotonic()
        if now >= self._terminate_at:
            self._terminate()
        if now >= self._kill_at:
            self._kill_at = math.inf
            if not self._killed_by_user and self.alive:
                logtail.say([f"sft-dist: {', '.join(p.rank.name for p in self.alive)} did not end in time: killed"])
            for process in self.alive:
                process.kill()

    def reap(self) -> None:
        ended = [process for process in self.alive if process.has_ended()]
        for process in ended:
            self.alive.remove(process)
            self._keeper.forget(process.pid)
        self._ended += ended
        # Of several found dead at once, the one with the plainer cause is named: a lost peer is an effect.
        failed = sorted((process for process in ended if process.code != 0), key=_blame)
        is_first = not self._failed
        self._failed += failed
        if failed and is_first:
            self._on_failure(failed[0])

    def _on_failure(self, first: _Process) -> None:
        if self._stopped_by is not None and (self._was_stopped(first) or first.code in logtail.SPOKEN):
            return
        if first.code == EXIT_USER:
            self._terminate_at = time.monotonic() + _SAME_FAULT_SECONDS
        elif first.code == EXIT_RESUMABLE:
            # The others leave at the same step, or when their watchdogs find the same hang.
            self._terminate_at = time.monotonic() + min(self._grace, _SAME_STOP_SECONDS)
        else:
            logtail.report(first.rank.name, first.code, first.rank.log_path, first.log_start)
            self._terminate()

    def _terminate(self) -> None:
        self._terminate_at = math.inf
        if self._stopped_by is None:
            for process in self.alive:
                process.signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + min(self._grace, _FAILURE_GRACE_SECONDS))

    def _was_stopped(self, process: _Process) -> bool:
        """Whether a process died of a signal that the launcher sent to it."""
        return any(process.code in (-number, 128 + number) for number in process.sent)

    def kill(self) -> None:
        """Kill what is still there; nothing, after an orderly end."""
        for process in self.alive:
            process.kill()
        for process in self.alive:
            process.wait()
            self._keeper.forget(process.pid)

    def exit_code(self) -> int:
        if self._killed_by_user:
            return 128 + signal.SIGINT
        if not self._failed:
            return 0
        first = self._failed[0]
        if self._was_stopped(first):
            if any(process.code == EXIT_RESUMABLE for process in self._failed):
                return EXIT_RESUMABLE
            if self._stopped_by is not None:
                return 128 + self._stopped_by
        return first.code if first.code > 0 else 128 - first.code

    def pass_on_messages(self) -> None:
        """Show what ranks said who could not be heard: one line each, unless rank 0 has said it."""
        code = self.exit_code()
        if code not in logtail.SPOKEN or any(p.code == code and p.rank.log_path is None for p in self._ended):
            return
        speakers = [process for process in self._failed if process.code == code]
        said = {line: None for p in speakers for line in logtail.message(p.rank.log_path, p.log_start)}
        logtail.say(said)
        if not said:
            first = speakers[0]
            logtail.report(first.rank.name, first.code, first.rank.log_path, first.log_start)


class _Process:
    """A started rank. `code` is as in subprocess: negative for a signal; `sent` are the signals it was sent."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.sent: set[int] = set()
        self.log_start = 0
        with contextlib.ExitStack() as files:
            output = None
            if rank.log_path is not None:
                output = files.enter_context(os.fdopen(_open_log(rank.log_path), "ab"))
                self.log_start = os.fstat(output.fileno()).st_size
            shim = [sys.executable, "-I", "-S", str(_TETHER), "run", str(os.getpid())]
            try:
                self._popen = subprocess.Popen(
                    [*shim, *rank.command],
                    env=dict(rank.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{rank.name} cannot be started: {error.strerror}; free processes or memory") from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def code(self) -> int:
        return int(self._popen.returncode)

    def has_ended(self) -> bool:
        """Whether it has ended; if so what it had started and left behind is killed, too."""
        if self._popen.poll() is None:
            return False
        self._kill_group()
        return True

    def signal(self, number: int) -> None:
        """To the process alone: its data loaders would die of a SIGUSR1 that it knows what to do with."""
        self.sent.add(number)
        self._popen.send_signal(number)

    def kill(self) -> None:
        self.sent.add(signal.SIGKILL)
        self._kill_group()

    def wait(self) -> None:
        self._popen.wait()

    def _kill_group(self) -> None:
        # macOS refuses a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _blame(process: _Process) -> tuple[int, int]:
    if process.code < 0 and -process.code not in process.sent:
        return 0, process.rank.rank
    return (1 if process.code in logtail.SPOKEN else 2), process.rank.rank


def _open_log(path: Path) -> int:
    """A log to append to, its owner's alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        os.fchmod(log, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another output.output_dir") from error
    return log


class _Signals:
    """Signals as numbers that can be waited for. What was ignored (`nohup`) stays ignored."""

    def __enter__(self) -> _Signals:
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        heard = [number for number in _FORWARDED if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {}
        for number in (*heard, signal.SIGCHLD):
            self._handlers[number] = signal.signal(number, _leave_to_the_pipe)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def wait(self, seconds: float | None) -> bytes:
        """The numbers of the signals that arrived, after at most so many seconds."""
        select.select([self._read], [], [], seconds)
        try:
            return os.read(self._read, 4096)
        except BlockingIOError:
            return b""


def _leave_to_the_pipe(_: int, __: FrameType | None) -> None:
    return None


class _Keeper:
    """A process that outlives a killed launcher for as long as it takes to kill the process groups it knows."""

    def __enter__(self) -> _Keeper:
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_TETHER), "watch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def watch(self, group: int) -> None:
        self._tell(group)

    def forget(self, group: int) -> None:
        self._tell(-group)

    def _tell(self, number: int) -> None:
        # A keeper that was killed is missed when the launcher is killed, too, and not before.
        with contextlib.suppress(OSError):
            assert self._popen.stdin is not None
            self._popen.stdin.write(f"{number}\n")
            self._popen.stdin.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            assert self._popen.stdin is not None
            self._popen.stdin.close()
        self._popen.wait()
