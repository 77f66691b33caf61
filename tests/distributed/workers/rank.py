"""A rank of plain Python for the launcher's tests: `rank.py FOLDER WORD...`, each word done in turn.

It leaves its process id in FOLDER/rank<RANK>.pid, once its signal handlers are in place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER, RANK = Path(sys.argv[1]), os.environ.get("RANK", "0")


def leave(name: str, text: str) -> None:
    """Write a file that is complete when it is there."""
    unfinished = FOLDER / f"{name}.unfinished"
    unfinished.write_text(text)
    unfinished.rename(FOLDER / name)


def note(number: int, _: object) -> None:
    with open(FOLDER / f"rank{RANK}.signals", "a") as file:
        file.write(signal.Signals(number).name + "\n")


def wait_for(name: str) -> None:
    while not (FOLDER / name).exists():
        time.sleep(0.005)


def do(word: str) -> None:
    verb, _, rest = word.partition("=")
    if verb == "exit":
        sys.exit(int(rest))
    elif verb == "die":
        os.kill(os.getpid(), signal.Signals[rest])
    elif verb == "say":
        print(rest.replace("\\n", "\n"), flush=True)
    elif verb == "note":
        for name in rest.split(","):
            signal.signal(signal.Signals[name], note)
    elif verb == "exit_on":
        name, _, code = rest.partition(":")
        signal.signal(signal.Signals[name], lambda *_: sys.exit(int(code)))
    elif verb == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        leave(f"rank{RANK}.child.pid", str(child.pid))
    elif verb == "tty":
        leave(f"rank{RANK}.tty", str(sys.stdout.isatty() and sys.stderr.isatty()))
    elif verb == "ready":
        leave(f"rank{RANK}.pid", str(os.getpid()))
    elif verb == "await":
        wait_for(rest)
    elif verb == "sleep":
        # Many short ones: a signal that was noted does not end them.
        end = time.monotonic() + float(rest or 30)
        while time.monotonic() < end:
            time.sleep(0.01)
    else:
        raise ValueError(word)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for argument in sys.argv[2:]:
        do(argument)
