"""Runs that are struck again and again until they are done, each compared with one that was left in peace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tests import outcome, tiny
from tests.distributed.chaos import plan
from tests.distributed.chaos.disk import Disk
from tests.distributed.chaos.plan import EVAL_STEPS, LASTING, MAX_FAILURES, SAVE_STEPS, STEPS, Strike
from tests.distributed.chaos.start import Start
from tests.distributed.chaos.strikes import GRACE, Pace, Verdict, after_damage, hit, reach
from tests.recipes import small_recipe

_SETTINGS = ("data.packing=true", "train.max_length=192", "train.per_device_train_batch_size=1",
             f"train.max_steps={STEPS}", "train.logging_steps=1", "train.full_determinism=true",
             "train.save_strategy=steps", f"train.save_steps={SAVE_STEPS}", "train.eval_strategy=steps",
             f"train.eval_steps={EVAL_STEPS}", "train.report_to=none", "eval.enabled=false",
             f"checkpoint.grace={GRACE:g}", "parallel.processes=2")  # fmt: skip
# Of a whole start; a run that hangs is killed.
_LONGEST = 300.0


@dataclass(frozen=True)
class Peace:
    """What an undisturbed run came to."""

    weights: str
    numbers: dict[tuple[int, str], Any]
    pace: Pace


@dataclass
class Struck:
    """A run that was struck. `late`: strikes that found it too far, or done; `faults`: what is wrong at its end."""

    number: int
    strategy: str
    verdicts: list[Verdict] = field(default_factory=list)
    late: list[Strike] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    starts: int = 0
    kept: Path | None = None

    @property
    def survived(self) -> bool:
        return not self.faults and all(verdict.survived for verdict in self.verdicts)


class Campaign:
    """Strikes at runs in `folder`, by a seed, each run `each` times; `say` takes lines for people."""

    def __init__(
        self, folder: Path, seed: int, strategies: Sequence[str], each: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.seed, self.strategies, self.each = folder, seed, strategies, each
        self._say = say
        self._peace: dict[str, Peace] = {}
        model = tiny.save_model(folder / "model", "opt", activation="gelu")
        config = AutoConfig.from_pretrained(model)
        config.dropout = 0.1
        config.save_pretrained(model)
        self._recipe = small_recipe(folder, model)

    def runs(self, strikes: int, only: int | None = None) -> Iterator[Struck]:
        """Runs until so many strikes have landed, or the run of one number."""
        number, landed = (0, 0) if only is None else (only, strikes - 1)
        while landed < strikes:
            run = self.run(number, self.each if only is not None else min(self.each, strikes - landed))
            landed += len(run.verdicts)
            number += 1
            yield run

    def run(self, number: int, most: int) -> Struck:
        """Strike at the run of a number, at most so many times, until it is done."""
        struck = Struck(number, self.strategies[number % len(self.strategies)])
        peace = self._undisturbed(struck.strategy)
        began = time.monotonic()
        queue = plan.of_run(self.seed, number, self.each)[:most]
        logs = self.folder / f"run-{number}-logs"
        logs.mkdir()
        disk = Disk(self.folder / f"run-{number}")
        try:
            while not self._start(struck, queue, disk, logs, peace.pace):
                pass
            struck.late += queue
            if not struck.faults and struck.survived:
                struck.faults += _compared(disk.run, peace)
        finally:
            if not struck.survived:
                struck.kept = self.folder / f"run-{number}-kept"
                disk.keep(struck.kept)
            disk.remove()
        if struck.survived:
            shutil.rmtree(logs)
        self._tell(struck, time.monotonic() - began)
        return struck

    def _tell(self, run: Struck, seconds: float) -> None:
        self._say(
            f"run {run.number} ({run.strategy}): {len(run.verdicts)} strikes, {len(run.late)} too late, {run.starts} "
            f"starts, {seconds:.0f} s, {'survived' if run.survived else 'DID NOT SURVIVE'}"
        )
        if run.survived:
            return
        for fault in run.faults:
            self._say(f"  {fault}")
        for verdict in run.verdicts:
            self._say(f"  {verdict.strike}: {'; '.join(verdict.faults) or 'survived'}")
        again = f"--seed {self.seed} --each {self.each} --strategies {','.join(self.strategies)} --only {run.number}"
        self._say(f"  kept in {run.kept} and {self.folder}/run-{run.number}-logs; again by {again}")

    def _start(self, struck: Struck, queue: list[Strike], disk: Disk, logs: Path, pace: Pace) -> bool:
        """Start a run once, and strike at it. Returns whether that was the last start."""
        words = [*self._words(struck.strategy, disk.run), *_settings_for(queue)]
        if (disk.run / "recipe.yaml").exists():
            words.append("output.resume=true")
        start = Start(self.folder, logs / f"start-{struck.starts}.log", words)
        pending = [verdict for verdict in struck.verdicts if verdict.redone is None]
        try:
            was_ended = _strike_once_or_more(struck, queue, start, disk, pace)
            if not was_ended and not start.wait_for_end(_LONGEST):
                struck.faults.append(f"start {struck.starts} hangs")
        finally:
            if start.code is None:
                start.kill()
        if not was_ended and start.code != 0:
            struck.faults.append(f"start {struck.starts} ended with exit code {start.code} though nothing struck it")
        _judge_the_start(pending, start, disk)
        struck.starts += 1
        return start.code == 0 or not struck.survived

    def _words(self, strategy: str, run: Path) -> list[str]:
        return [str(self._recipe), *_SETTINGS, f"parallel.strategy={strategy}", f"output.output_dir={run}"]

    def _undisturbed(self, strategy: str) -> Peace:
        """The run of a strategy that nothing strikes, once."""
        if strategy not in self._peace:
            run = self.folder / f"peace-{strategy}"
            start = Start(self.folder, self.folder / f"peace-{strategy}.log", self._words(strategy, run))
            start.wait(lambda: start.done > 0, _LONGEST)
            first = start.age
            start.wait(lambda: start.last_step == STEPS, _LONGEST)
            last = start.age
            if not start.wait_for_end(_LONGEST) or start.code != 0:
                start.kill()
                raise RuntimeError(f"the undisturbed run of {strategy} failed: {start.log}")
            pace = Pace(first, (last - first) / STEPS, start.age - last)
            self._say(
                f"undisturbed run ({strategy}): {pace.start_up:.1f} s to the first step, {pace.step:.2f} s a step, "
                f"{pace.end:.1f} s from the last one to the end"
            )
            self._peace[strategy] = Peace(outcome.weights_hash(run), outcome.numbers(run), pace)
        return self._peace[strategy]


def _settings_for(queue: Sequence[Strike]) -> list[str]:
    """What a start needs so that the strike that will end it is noticed soon, and none that it is to outlive."""
    kind = next((strike.kind for strike in queue if strike.kind not in LASTING), "")
    failures = MAX_FAILURES if kind == "disk full, stays" else 1000
    # A hang is no shorter than what another program on the machine may take away from a step.
    hangs = ["guard.hang_seconds=6", "guard.hang_factor=10"] if kind == "SIGSTOP of a rank" else []
    return [f"checkpoint.max_failures={failures}", *hangs]


def _strike_once_or_more(struck: Struck, queue: list[Strike], start: Start, disk: Disk, pace: Pace) -> bool:
    """Strike at a start until a strike ends it, which is returned, or there is nothing more to strike (at)."""
    while queue:
        landed = reach(start, disk, queue[0], pace)
        if not landed and start.code is not None:
            return False
        strike = queue.pop(0)
        verdict = hit(start, disk, strike) if landed else None
        if verdict is None:
            struck.late.append(strike)
            continue
        struck.verdicts.append(verdict)
        if strike.kind not in LASTING or not verdict.survived:
            return True
    return False


def _judge_the_start(pending: Sequence[Verdict], start: Start, disk: Disk) -> None:
    """What a start tells of the strikes before it: from where it went on."""
    for verdict in pending:
        if start.from_step is not None:
            verdict.redone = max(0, verdict.reached - start.from_step) if verdict.reached is not None else 0
            if verdict.redone > verdict.most:
                verdict.faults.append(f"{verdict.redone} steps were done again, at most {verdict.most} had to be")
        if verdict.damaged is not None and (start.from_step is not None or start.done):
            verdict.faults += after_damage(start, disk, verdict)


def _compared(run: Path, peace: Peace) -> list[str]:
    """What differs from the undisturbed run."""
    faults = [f"{path} is left" for pattern in ("*.unfinished", ".seen-*") for path in run.rglob(pattern)]
    if outcome.weights_hash(run) != peace.weights:
        faults.append("the weights are others than those of the undisturbed run")
    try:
        found = outcome.numbers(run)
    except AssertionError as error:
        return [*faults, f"metrics.jsonl: {error}"]
    if found != peace.numbers:
        keys = sorted(key for key in {*found, *peace.numbers} if found.get(key) != peace.numbers.get(key))
        faults.append(f"metrics.jsonl: {len(keys)} numbers differ, the first is {keys[0]}")
    return faults
