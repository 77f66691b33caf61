"""Running trials: what whoever runs them has to do, and running them one after another on this machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch import check, local, logtail, retries
from launch.line_files import end_of
from launch.processes import Ending
from launch.sweep.trials import Trial, described
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, UserError
from sft_dist.rundir import command_line
from sft_dist.runlock import RunLock

# What a log says of the commoner ends, and the word for it in a table.
_WORDS = (
    (r"out of memory|OutOfMemoryError|Cannot allocate memory|DefaultCPUAllocator", "out of memory"),
    (r"No space left on device|disk full", "disk full"),
    (r"\b(NaN|nan|infinity|not finite|non-finite)\b", "not finite"),
    (r"killed by SIG(\w+)", r"killed by SIG\1"),
)
_ERROR = re.compile(r"^\s*([A-Za-z_][\w.]*(?:Error|Exception|Interrupt))\b", re.MULTILINE)
_TAIL_BYTES = 1 << 16
_LONGEST_SAID = 500


@dataclass(frozen=True)
class Ended:
    """What became of a trial. `stopped`: it was told to stop, and so is the sweep; `reason`: why it is not done.

    `said`: the line by which the run told why.
    """

    trial: Trial
    code: int
    stopped: bool
    seconds: float
    reason: str | None = None
    said: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it ended by itself in a way that trying again would not mend."""
        return not self.stopped and self.code not in (EXIT_DONE, EXIT_RESUMABLE)


class Runner(Protocol):
    """Runs trials, or hands them to whoever does. `waits`: for them to end."""

    waits: bool

    def look(self, recipe: Recipe) -> list[str]:
        """What of a trial would fail later, one a line; nothing is changed."""
        ...

    def run(self, trials: Sequence[Trial]) -> Iterator[Ended]:
        """What became of each, as soon as it is known. Those that were only handed on, or were not begun for a signal
        to stop, are not told of. Before a trial is begun, its folder holds its recipe (:func:`sft_dist.rundir.claim`).
        """
        ...


class LocalRunner:
    """One trial after another on this machine. The output of all ranks goes to `logs/` in the trial's folder."""

    waits = True

    def __init__(self, group: str, tries: int) -> None:
        # What W&B shows as one; the user's own word counts.
        os.environ.setdefault("WANDB_RUN_GROUP", group)
        self._tries = tries

    def look(self, recipe: Recipe) -> list[str]:
        """What of a trial would fail on this machine."""
        return [finding.text for finding in check.findings(recipe) if finding.level != "fine"]

    def run(self, trials: Sequence[Trial]) -> Iterator[Ended]:
        """As the protocol says; the first that was told to stop is the last."""
        for number, trial in enumerate(trials, 1):
            log = trial.folder / "logs" / "rank0.log"
            again = ", going on" if trial.recipe.output.resume else ""
            say(f"{trial.name} ({number} of {len(trials)}{again}): {described(trial.settings)}  [{log}]")
            ended = self._one(trial, log)
            yield ended
            if ended.stopped:
                return

    def _one(self, trial: Trial, log: Path) -> Ended:
        began, start = time.monotonic(), log.stat().st_size if log.exists() else 0
        endings: list[Ending] = []

        def begin(file: Path, recipe: Recipe) -> Ending:
            endings.append(local.run(file, recipe, quiet=True))
            return endings[-1]

        fault = ""
        try:
            with RunLock(trial.folder, "sft-dist sweep"):
                code = retries.run(trial.recipe, command_line(), self._tries, begin)
        except UserError as error:
            logtail.say([f"sft-dist: {error}"])
            code, fault = EXIT_USER, f"sft-dist: {error}"
        stopped = bool(endings) and endings[-1].stopped
        took = time.monotonic() - began
        text = fault or end_of(log, _TAIL_BYTES, start).decode("utf-8", errors="replace")
        if code == EXIT_DONE or stopped:
            return Ended(trial, code, stopped, took, "stopped" if code != EXIT_DONE else None)
        return Ended(trial, code, stopped, took, why(code, text), last_words(text))


def why(code: int, text: str) -> str:
    """Why a run ended with a code other than 0, in a word or two. `text`: the end of its log."""
    last = "\n".join(line for line in text.splitlines() if line.startswith("sft-dist:")) or text
    for pattern, word in _WORDS:
        # What a run says of itself before what stands in a stack of libraries.
        if found := re.search(pattern, last) or re.search(pattern, text):
            return found.expand(word)
    if code > 128:
        return logtail.cause(128 - code).removeprefix("was ").partition(" (")[0]
    if code == EXIT_USER and re.search(r"^sft-dist: [^\s:]+:\d+: ", last, re.MULTILINE):
        return "bad data"
    if code == EXIT_USER and (key := re.search(r"^(?:sft-dist: )?([a-z]+\.[a-z_0-9]+): ", last, re.MULTILINE)):
        return key[1]
    errors = _ERROR.findall(text)
    return errors[-1].rpartition(".")[2] if errors else f"exit code {code}"


def last_words(text: str) -> str | None:
    """The line of a log that says why it ends: the run's own, else that of the last exception."""
    lines = [line.strip() for line in text.splitlines()]
    told = [line.removeprefix("sft-dist: ") for line in lines if line.startswith("sft-dist: ")]
    told = told or [line for line in lines if _ERROR.match(line)]
    return told[-1][:_LONGEST_SAID] if told else None


def say(line: str) -> None:
    """A line about the sweep, on stdout, at once."""
    print(line, flush=True)
