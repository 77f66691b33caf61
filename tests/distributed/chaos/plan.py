"""What strikes a run, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

STEPS, SAVE_STEPS, EVAL_STEPS = 60, 2, 5
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
DAMAGES = ("truncated file", "flipped bit")
KINDS = ("SIGKILL to a rank", "SIGKILL to all", "SIGKILL in a save", *(f"{name} to the launcher" for name in SIGNALS),
         "SIGSTOP of a rank", *DAMAGES, "disk full, freed", "disk full, stays", "disk full, at the end",
         "read-only folder")  # fmt: skip
# The same start trains on after them.
LASTING = ("disk full, freed", "read-only folder")
MAX_FAILURES = 3
_MOMENTS = ("step", "step", "step", "start-up", "save", "evaluation")
# A hang is found by comparing with the steps before, and several saves in a row take their time to fail.
_FIRST = {"SIGSTOP of a rank": 7}
_LAST = {"SIGSTOP of a rank": STEPS - 4, "disk full, stays": STEPS - 2 * SAVE_STEPS * MAX_FAILURES,
         "disk full, freed": STEPS - 3 * SAVE_STEPS, "read-only folder": STEPS - 3 * SAVE_STEPS}  # fmt: skip
# The others need what comes after them, or are a moment themselves.
_SET = dict.fromkeys((*DAMAGES, *LASTING, "disk full, stays"), "step")
_SET |= {"SIGKILL in a save": "save", "disk full, at the end": "end"}
_END = 0.6


@dataclass(frozen=True)
class Strike:
    """`steps`: done by the start before; `delay`: how far into the moment, `pick`: what is hit, both 0 to 1."""

    kind: str
    moment: str
    steps: int
    delay: float
    pick: float

    @property
    def latest(self) -> int:
        """The last step at which there is use in it."""
        return _LAST.get(self.kind, STEPS - 1 if self.moment != "end" else STEPS)

    def __str__(self) -> str:
        when = f"{self.moment}, {self.steps} steps into the start" if self.moment != "start-up" else self.moment
        return f"{self.kind} ({when}, delay {self.delay:.2f}, pick {self.pick:.3f})"


def of_run(seed: int, number: int, count: int) -> list[Strike]:
    """The strikes of the run of this number, of so many each; the same whatever the other runs are."""
    kinds = islice(_deck(seed), number * count, (number + 1) * count)
    draw = random.Random(f"{seed}:{number}")
    found: list[Strike] = []
    for place, kind in enumerate(kinds):
        strike = _drawn(kind, draw)
        if (
            place == count - 1
            and strike.moment == "step"
            and kind not in (*_SET, "SIGSTOP of a rank")
            and draw.random() < _END
        ):
            strike = replace(strike, moment="end")
        if found and found[-1].kind in DAMAGES and strike.moment == "start-up":
            # The start has to live until it says what it found.
            strike = replace(strike, moment="step")
        found.append(strike)
    # What is struck behind the last step comes last, or all that follows would be too late.
    return sorted(found, key=lambda strike: strike.moment == "end")


def _drawn(kind: str, draw: random.Random) -> Strike:
    moment = _SET.get(kind) or draw.choice(_MOMENTS)
    if kind == "SIGSTOP of a rank" and moment == "start-up":
        # Nothing watches over it yet.
        moment = "step"
    first = _FIRST.get(kind, 1)
    return Strike(kind, moment, draw.randint(first, first + 5), draw.random(), draw.random())


def _deck(seed: int) -> Iterator[str]:
    """All kinds in a drawn order, again and again."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(KINDS, len(KINDS))
