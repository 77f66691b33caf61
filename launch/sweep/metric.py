"""The number by which the trials of a sweep are compared: whether their runs will have it, and reading it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sft_dist.config import Recipe
from sft_dist.recipe_names import near_name
from sft_dist.rundir import RunDir

# By where they stand in `summary.json`.
_SUMMARY: dict[str, tuple[str, ...]] = {
    "final_loss": ("final_loss",),
    "after_loss": ("after", "loss"),
    "after_perplexity": ("after", "perplexity"),
    "seconds": ("seconds",),
    "peak_memory_gb": ("peak_memory_gb",),
    "tokens_per_second": ("tokens_per_second",),
    "trained_tokens_per_second": ("trained_tokens_per_second",),
}
_TRAINING = ("loss", "train_loss", "train_runtime", "perplexity", "grad_norm", "entropy", "mean_token_accuracy", "mfu")
_HELD_OUT = ("eval_loss", "eval_perplexity", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# Measured after training by the same code on the same rows.
_ALSO_AFTER = {"eval_loss": "after_loss", "eval_perplexity": "after_perplexity"}


def greater_is_better(name: str) -> bool:
    """Whether more of it is better, by its name."""
    return name == "mfu" or name.endswith("_per_second") or "accuracy" in name


def fault(name: str, recipe: Recipe) -> str | None:
    """Why a run of the recipe will not have the number, with the mend, or None where it will."""
    sources = [f"loss/{source}" for source in recipe.data.mixture or {}]
    known = [*_SUMMARY, *_TRAINING, *_HELD_OUT, *sources]
    if name not in known:
        near = near_name(name, known)
        mend = f"did you mean {near}" if near else f"take one of {', '.join(known)}"
        return f"{name} is in no run's metrics.jsonl or summary.json, {mend}"
    if not name.startswith(("eval_", "after_")):
        return None
    if recipe.data.dataset_test_split is None and not recipe.data.test_split_size:
        return f"{name} is never measured, for nothing is held out; set data.test_split_size"
    while_training, after = recipe.train.eval_strategy != "no", recipe.eval.enabled
    if name in _ALSO_AFTER and not (while_training or after):
        return f"{name} is never measured; set eval.enabled=true or train.eval_strategy=epoch"
    if name.startswith("after_") and not after:
        return f"{name} is never measured; set eval.enabled=true"
    if name.startswith("eval_") and name not in _ALSO_AFTER and not while_training:
        return f"{name} is never measured; set train.eval_strategy=epoch"
    return None


def read(run: RunDir, name: str, which: Literal["last", "best"], greater: bool) -> float | None:
    """The number of a run that is done, None where it has none or one that is not finite."""
    values = [*_logged(run.metrics, name), *_summarised(summary(run), name)]
    finite = [value for value in values if math.isfinite(value)]
    if which == "best" and finite:
        return max(finite) if greater else min(finite)
    return values[-1] if values and math.isfinite(values[-1]) else None


def summary(run: RunDir) -> dict[str, Any]:
    """What the run wrote at its end; empty where there is nothing that can be read."""
    try:
        held = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def last_step(run: RunDir) -> int | None:
    """The last step that the log has."""
    return max((row["step"] for row in _rows(run.metrics) if "loss" in row), default=None)


def number(value: Any) -> float | None:
    """A number as it stands in JSON, None for anything else and for what is not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _summarised(held: Mapping[str, Any], name: str) -> Iterator[float]:
    value: Any = held
    for part in _SUMMARY.get(_ALSO_AFTER.get(name, name), ("",)):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _logged(path: Path, name: str) -> Iterator[float]:
    for row in _rows(path):
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield float(value)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `metrics.jsonl`, by step: whole lines only."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
