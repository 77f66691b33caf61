"""How far a run is, by its metrics, its recipe and its checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.line_files import end_of
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.rundir import RunDir

# Records of some hundred bytes: enough of them to know how long a step takes.
_TAIL_BYTES = 1 << 19
_INTERVALS = 200
# A run says nothing for a while when it saves or evaluates.
_QUIET_SECONDS = 120.0
_QUIET_INTERVALS = 5.0

Record = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a training is. What is not known is None.

    `seconds_per_step` is measured over the newest steps, evaluations and saves among them, waiting and loading not.
    `recorded`: when the newest record was, seconds since the epoch; `interval`: seconds between two records.
    """

    step: int | None = None
    steps: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    interval: float | None = None
    recorded: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training to the last step."""
        if self.step is None or self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step

    def quiet_for(self, now: float) -> float | None:
        """Seconds without a record, where they are more than is to be expected."""
        if self.recorded is None or self.interval is None:
            return None
        quiet = now - self.recorded
        return quiet if quiet > max(_QUIET_SECONDS, _QUIET_INTERVALS * self.interval) else None


def progress(root: Path, starts: Sequence[float] = ()) -> Progress:
    """Read it. `starts`: when attempts began, in seconds since the epoch: what lies between two is no time of steps."""
    run = RunDir(root)
    records = _tail(run.metrics)
    steps = [record for record in records if "loss" in record]
    newest = steps[-1] if steps else None
    recipe = _recipe(root)
    held_out = next((record for record in reversed(records) if "eval_loss" in record), None) or _last_evaluation(
        run.metrics
    )
    seconds, interval = _pace(steps, starts)
    return Progress(
        step=_whole(newest, "step"),
        steps=_steps(newest, recipe),
        epoch=_number(newest, "epoch"),
        epochs=None if recipe is None or recipe.train.max_steps > 0 else float(recipe.train.num_train_epochs),
        loss=_number(newest, "loss"),
        eval_loss=_number(held_out, "eval_loss"),
        eval_step=_whole(held_out, "step"),
        tokens_per_second=_number(newest, "tokens_per_second"),
        seconds_per_step=seconds,
        interval=interval,
        recorded=_number(newest, "time"),
    )


def newest_checkpoint(root: Path) -> tuple[int, float] | None:
    """Step of the newest complete checkpoint, by the sizes of its files, and when it was written."""
    from sft_dist.checkpoints import folder, manifest

    with contextlib.suppress(OSError):
        step = max(folder.complete(RunDir(root).checkpoints), default=None)
        if step is not None:
            written = (folder.path_of(RunDir(root).checkpoints, step) / manifest.NAME).stat().st_mtime
            return step, written
    return None


def _steps(newest: Record | None, recipe: Recipe | None) -> int | None:
    """The number of steps of the whole training."""
    told = _whole(newest, "max_steps")
    if told:
        return told
    if recipe is None:
        return None
    if recipe.train.max_steps > 0:
        return recipe.train.max_steps
    # Of a run before records told it.
    step, epoch = _number(newest, "step"), _number(newest, "epoch")
    return math.ceil(round(step / epoch * recipe.train.num_train_epochs, 3)) if step and epoch else None


def _pace(steps: Sequence[Record], starts: Sequence[float]) -> tuple[float | None, float | None]:
    """Seconds of a step, and between two records."""
    took: list[tuple[float, int]] = []
    for before, after in itertools.pairwise(steps):
        done = after["step"] - before["step"]
        seconds = _between(before, after, starts)
        if done > 0 and seconds is not None and seconds > 0:
            took.append((seconds, done))
    took = took[-_INTERVALS:]
    if not took:
        return None, None
    total = sum(seconds for seconds, _ in took)
    return total / sum(done for _, done in took), total / len(took)


def _between(before: Record, after: Record, starts: Sequence[float]) -> float | None:
    first, last = _number(before, "time"), _number(after, "time")
    if first is not None and last is not None:
        return None if any(first < start <= last for start in starts) else last - first
    tokens, rate = [_number(each, "num_tokens") for each in (before, after)], _number(after, "tokens_per_second")
    return (tokens[1] - tokens[0]) / rate if tokens[0] is not None and tokens[1] is not None and rate else None


def _tail(path: Path) -> list[Record]:
    # The first may be half a line, which is no record.
    return [record for line in end_of(path, _TAIL_BYTES).splitlines() if (record := _record(line)) is not None]


def _last_evaluation(path: Path) -> Record | None:
    found = None
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            if b'"eval_loss"' in line:
                found = _record(line) or found
    return found


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _recipe(root: Path) -> Recipe | None:
    from sft_dist.recipe import load_recipe

    try:
        return load_recipe(RunDir(root).recipe)
    except (UserError, OSError):
        # Of another version, or not there.
        return None


def _number(record: Record | None, name: str) -> float | None:
    value = record.get(name) if record is not None else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(record: Record | None, name: str) -> int | None:
    value = record.get(name) if record is not None else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
