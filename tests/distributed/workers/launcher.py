"""A launcher in a process of its own: `launcher.py FOLDER GRACE_SECONDS WORDS...`, one string of words a rank."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

from launch.processes import Rank, run_ranks

WORKER = Path(__file__).with_name("rank.py")


def ranks(folder: Path, *words: str) -> list[Rank]:
    """Ranks that do these words; all but rank 0 log to `folder`."""
    return [
        Rank(
            rank,
            [sys.executable, "-u", str(WORKER), str(folder), *shlex.split(text)],
            {**os.environ, "RANK": str(rank)},
            folder / "logs" / f"rank{rank}.log" if rank else None,
        )
        for rank, text in enumerate(words)
    ]


if __name__ == "__main__":
    # A shell that runs the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run_ranks(ranks(Path(sys.argv[1]), *sys.argv[3:]), grace_seconds=float(sys.argv[2])))
