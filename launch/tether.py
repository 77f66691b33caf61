"""What ties worker processes to the life of their launcher. Run as a script, by an isolated interpreter.

`tether.py run LAUNCHER COMMAND...` becomes COMMAND after asking the kernel (Linux) to kill this process when its
parent dies. It is a program between the launcher and the worker because the alternative, code that runs between
fork and exec (`preexec_fn`), can deadlock on a lock that another thread held at the fork.

`tether.py watch` reads process groups from its standard input, `+N` to watch one and `-N` to forget it, and
kills those left when the other end closes. The kernel's promise does not reach what the workers have started
themselves, and does not exist on macOS.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1


def run(launcher: int, command: list[str]) -> None:
    """Become `command`, to be killed when the process `launcher` dies. Does not return."""
    # A signal that comes now ends this process without a traceback of Python's.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the kernel was asked.
    if os.getppid() != launcher:
        os._exit(1)
    # Ignored by the interpreter itself, and that would be inherited.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


def watch(lines: Iterable[str]) -> None:
    """Keep account of process groups until `lines` end, then kill those that are left."""
    # Slurm signals every process of a job; this one has to outlive the others.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in lines:
        group = int(line)
        if group > 0:
            groups.add(group)
        else:
            groups.discard(-group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(int(sys.argv[2]), sys.argv[3:])
    else:
        watch(iter(sys.stdin.readline, ""))
