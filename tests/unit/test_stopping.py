"""Signals: what a process does that is sent one, at whatever moment and whatever it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from signal import Signals

import pytest

from sft_dist.errors import EXIT_RESUMABLE
from sft_dist.stopping import Stopped, StopRequests
from tests.recipes import ROOT, hear_interrupts

PATIENCE = 60.0
pytestmark = pytest.mark.timeout(PATIENCE)
ALL = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
# `hang` is what a collective is: nothing but its own end brings it back, not even a signal.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from sft_dist.process import guarded
from sft_dist.stopping import Stopped, StopRequests

def hang():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_init(mutex, None)
    lock = libc.pthread_mutex_lock
    threading.Thread(target=watch, daemon=True).start()
    lock(mutex); hangs = True; lock(mutex)

def watch():
    while "hangs" not in sys._current_frames()[threading.main_thread().ident].f_locals:
        time.sleep(0.01)
    print("hangs", flush=True)

def tell():
    while not requests.number:
        time.sleep(0.01)
    print("noted", requests.name, flush=True)

def ready():
    print("ready", flush=True)

requests = StopRequests({names!r}, {grace})

def work():
    with requests:
{body}
    print("left", flush=True)

sys.exit(guarded(work))
"""


class Process:
    """A process that is sent signals."""

    def __init__(self, body: str, names: tuple[str, ...], grace: float) -> None:
        indented = "".join(f"        {line}\n" for line in body.strip().splitlines())
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(names=list(names), grace=grace, body=indented)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=hear_interrupts,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._out, self._err = self._process.stdout, self._process.stderr

    def hears(self, line: str) -> None:
        """Wait for a line of its output."""
        assert self._out.readline() == line + "\n", self.end()

    def send(self, *numbers: Signals) -> None:
        for number in numbers:
            self._process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, what was left of its output, and what it said on stderr."""
        out, err = self._out.read(), self._err.read()
        return self._process.wait(), out, err

    def lives_for(self, seconds: float) -> bool:
        """Whether it does not end for so long."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Process] = []

    def begin(body: str, names: tuple[str, ...] = ALL, grace: float = PATIENCE) -> Process:
        made.append(Process(body, names, grace))
        return made[-1]

    yield begin
    for each in made:
        each.close()


@pytest.mark.parametrize("name", ALL)
def test_outside_of_the_training_a_signal_ends_the_process(start: Start, name: str) -> None:
    process = start(
        """
try:
    ready()
    threading.Event().wait()
except Exception:
    print("no library is to catch it")
"""
    )
    process.hears("ready")
    process.send(Signals[name])
    said = f"sft-dist: stopped by {name} outside of the training; nothing had to be saved\n"
    assert process.end() == (EXIT_RESUMABLE, "", said)
    assert EXIT_RESUMABLE == 75


@pytest.mark.parametrize("name", ALL)
def test_inside_it_is_only_noted(start: Start, name: str) -> None:
    process = start(
        """
requests.within_training = True
ready()
while not requests.number:
    time.sleep(0.01)
print(requests.name, 50 < requests.seconds_left < 60)
"""
    )
    process.hears("ready")
    process.send(Signals[name])
    assert process.end() == (0, f"{name} True\nleft\n", "")


def test_the_first_signal_counts(start: Start) -> None:
    process = start(
        """
requests.within_training = True
heard = []
before = signal.getsignal(signal.SIGUSR2)
signal.signal(signal.SIGUSR2, lambda *_: (before(*_), heard.append(1)))
ready()
tell()
left = requests.seconds_left
while not heard:
    time.sleep(0.01)
print(requests.name, requests.seconds_left < left)
"""
    )
    process.hears("ready")
    process.send(Signals.SIGTERM)
    process.hears("noted SIGTERM")
    process.send(Signals.SIGUSR2)
    assert process.end() == (0, "SIGTERM True\nleft\n", "")


@pytest.mark.parametrize("within", [True, False])
def test_after_the_grace_a_process_that_hangs_ends(start: Start, within: bool) -> None:
    process = start(f"requests.within_training = {within}\nhang()", grace=0.4)
    process.hears("hangs")
    began = time.monotonic()
    process.send(Signals.SIGTERM)
    said = "sft-dist: SIGTERM: no step ended within checkpoint.grace (0.4 s); goes on from its newest checkpoint\n"
    assert process.end() == (EXIT_RESUMABLE, "", said)
    assert time.monotonic() - began >= 0.4


def test_a_signal_is_heard_while_the_process_hangs(start: Start) -> None:
    process = start("threading.Thread(target=tell).start()\nhang()")
    process.hears("hangs")
    process.send(Signals.SIGUSR1)
    process.hears("noted SIGUSR1")
    assert process.lives_for(0)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_interrupt_ends_the_process_at_once(start: Start, first: str) -> None:
    process = start(
        """
requests.within_training = True
threading.Thread(target=tell).start()
hang()
"""
    )
    process.hears("hangs")
    process.send(Signals[first])
    process.hears(f"noted {first}")
    if first != "SIGINT":
        # Not the second signal ends it, but the second interrupt.
        process.send(Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGINT)
        assert process.lives_for(0.3)
    # Two of the same that nobody has heard yet are one.
    process.send(Signals.SIGINT)
    while process.lives_for(0.5):
        process.send(Signals.SIGINT)
    assert process.end() == (130, "", "")


@pytest.mark.parametrize(
    ("number", "code"),
    [(Signals.SIGTERM, -Signals.SIGTERM), (Signals.SIGUSR2, -Signals.SIGUSR2), (Signals.SIGINT, 130),
     (Signals.SIGUSR1, EXIT_RESUMABLE)],
)  # fmt: skip
def test_other_signals_keep_their_meaning(start: Start, number: Signals, code: int) -> None:
    process = start("ready()\nthreading.Event().wait()", names=("SIGUSR1",))
    process.hears("ready")
    process.send(number)
    assert process.end()[0] == code


def test_what_the_process_ignores_is_not_heard(start: Start) -> None:
    process = start(
        """
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
ready()
os.kill(os.getpid(), signal.SIGUSR2)
print(requests.number)
""",
        names=("SIGTERM",),
    )
    process.hears("ready")
    assert process.end() == (0, "0\nleft\n", "")


@pytest.mark.parametrize("thread", ["main", "another"])
def test_a_forked_child_is_stopped_by_its_parent_only(start: Start, thread: str) -> None:
    """A signal to a terminal reaches all of its processes: those that load data are still needed for the last step."""
    process = start(
        f"""
requests.within_training = True
reading, writing = os.pipe()
def ready_to_end():
    os.write(writing, b".")
def is_ready():
    os.read(reading, 1)
def fork():
    child = os.fork()
    if not child:
        ignored = [name for name in {ALL!r} if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN]
        os.kill(os.getpid(), signal.SIGINT)
        stranger = os.fork()
        if not stranger:
            os.kill(os.getppid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(stranger, 0)
        # Two at once would be one.
        while signal.SIGTERM in signal.sigpending():
            time.sleep(0.01)
        print("child", *ignored, signal.set_wakeup_fd(-1), requests.number, flush=True)
        ready_to_end()
        while True:
            signal.pause()
    is_ready()
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), requests.number, flush=True)
if {thread!r} == "main":
    fork()
else:
    other = threading.Thread(target=fork)
    other.start()
    other.join()
"""
    )
    assert process.end() == (0, f"child SIGINT SIGUSR1 SIGUSR2 -1 0\n{-Signals.SIGTERM} 0\nleft\n", "")


def test_a_forked_child_does_not_outlive_its_parent(start: Start) -> None:
    """Though it was told nothing, or what it was told came together with a stranger's signal."""
    process = start(
        """
requests.within_training = True
if os.fork():
    os._exit(0)
while True:
    signal.pause()
"""
    )
    # Its end is that of the pipe that both write to.
    assert process.end() == (0, "", "")


def test_the_end_of_a_run_leaves_nothing(start: Start) -> None:
    process = start(
        """
requests.within_training = True
os.kill(os.getpid(), signal.SIGTERM)
timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
listeners = [each for each in threading.enumerate() if each.name == "stop-requests"]
requests.__exit__(None)
for each in timers + listeners:
    each.join()
print(len(timers) > 0, len(listeners), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
      signal.getsignal(signal.SIGINT) == signal.default_int_handler, signal.set_wakeup_fd(-1), flush=True)
child = os.fork()
if not child:
    os._exit(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
print(os.waitpid(child, 0)[1], flush=True)
os.kill(os.getpid(), signal.SIGTERM)
""",
        grace=0.2,
    )
    assert process.end() == (-Signals.SIGTERM, "True 1 True True -1\n0\n", "")


def test_without_a_signal_the_whole_grace_is_left() -> None:
    before = {name: signal.getsignal(Signals[name]) for name in ALL}
    with StopRequests(ALL, 7.0) as requests:
        assert requests.number == 0
        assert requests.seconds_left == 7.0
        assert requests.name == "a signal on another rank"
    assert {name: signal.getsignal(Signals[name]) for name in ALL} == before
    assert not issubclass(Stopped, Exception)
