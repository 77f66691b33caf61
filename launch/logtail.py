"""What a failed rank's log tells the user: the end of it, or the one line that the rank meant for them."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from launch.line_files import end_of
from sft_dist.errors import EXIT_RESUMABLE, EXIT_USER

# Codes of a rank that has said itself, in one line, why it ended.
SPOKEN = (EXIT_USER, EXIT_RESUMABLE)
PREFIX = "sft-dist:"
_LINES = 20
_TAIL_BYTES = 1 << 16
# How `logstamp` begins each line.
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ")


def report(name: str, code: int, log: Path | None, start: int) -> None:
    """Print to stderr which rank failed and how, then the last 20 lines of its log from byte `start` on.

    `code` is as in subprocess: negative for a death by signal.
    """
    lines = _tail(log, start)[-_LINES:]
    say(
        [
            f"{PREFIX} {name} {cause(code)}" + (f"; the end of {log}:" if lines else ""),
            *(f"  {line}" for line in lines),
        ]
    )


def say(lines: Iterable[str]) -> None:
    """Print lines to stderr. A terminal that has gone away must not keep the launcher from ending the ranks."""
    with contextlib.suppress(OSError):
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def cause(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (often: out of memory)" if -code == signal.SIGKILL else "")


def message(log: Path | None, start: int) -> list[str]:
    """The last lines beginning with `sft-dist:` that stand together, in a log from byte `start` on."""
    before_last = itertools.dropwhile(lambda line: not line.startswith(PREFIX), reversed(_tail(log, start)))
    return list(itertools.takewhile(lambda line: line.startswith(PREFIX), before_last))[::-1]


def _tail(log: Path | None, start: int) -> list[str]:
    """The last lines of a log, as they can be shown: a progress bar's last state, no control characters, no times."""
    if log is None:
        return []
    text = end_of(log, _TAIL_BYTES, start).decode("utf-8", errors="replace")
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    shown = (_TIME.sub("", line) for line in shown)
    printable = ("".join(c if c.isprintable() else " " for c in line).rstrip() for line in shown)
    return [line for line in printable if line]
