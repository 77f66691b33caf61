"""How far a run is from the same run on one process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from sft_dist.verify.cases import LEARNING_RATE, TOLERANCE

_FILES = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Difference:
    """The largest differences of a run from the reference.

    `loss`, `grad_norm`: relative, over the steps. `weights`: of each tensor max|w - v| over max|v|, or over the
    learning rate, which is the length of Adam's first step, where that is more.
    """

    loss: float
    grad_norm: float
    weights: float

    @property
    def largest(self) -> float:
        """The largest of them; infinite for a NaN."""
        every = (self.loss, self.grad_norm, self.weights)
        return math.inf if any(math.isnan(one) for one in every) else max(every)

    @property
    def equal(self) -> bool:
        """Whether all are round-off."""
        return self.largest <= TOLERANCE


def difference(run: Path, reference: Path) -> Difference:
    """Compare two finished runs. Raises ValueError where they trained other steps, tokens or weights."""
    ours, theirs = _steps(run), _steps(reference)
    counted = [[row["num_trained_tokens"] for row in rows] for rows in (ours, theirs)]
    if counted[0] != counted[1]:
        raise ValueError(f"other trained tokens at the steps: {counted[0]} and {counted[1]}")
    worst = {
        key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-30) for a, b in zip(ours, theirs, strict=True))
        for key in ("loss", "grad_norm")
    }
    return Difference(worst["loss"], worst["grad_norm"], _weights(run, reference))


def _steps(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def _weights(run: Path, reference: Path) -> float:
    worst = 0.0
    with (
        safe_open(_file(run), framework="pt") as ours,
        safe_open(_file(reference), framework="pt") as theirs,
    ):
        names = set(theirs.keys())
        if set(ours.keys()) != names:
            raise ValueError(f"other weights were written: {sorted(set(ours.keys()) ^ names)[:3]}")
        for name in names:
            a, b = ours.get_tensor(name).double(), theirs.get_tensor(name).double()
            apart = float((a - b).abs().max()) / max(float(b.abs().max()), LEARNING_RATE)
            worst = math.nan if math.isnan(apart) else max(worst, apart)
    return worst


def _file(run: Path) -> Path:
    return next(file for name in _FILES if (file := run / "model" / name).is_file())
