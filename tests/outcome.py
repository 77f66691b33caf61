"""What a run came to: the numbers of its log and its weights, so that two runs can be compared to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Times, memory, and the mean over the steps of one start, which transformers adds at the end.
OF_THE_START = ("second", "memory", "runtime", "total_flos", "train_loss")


def numbers(run: Path) -> dict[tuple[int, str], Any]:
    """Every number of a run's log that is no matter of its start, by step and name; none stands there twice."""
    found: dict[tuple[int, str], Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name == "time" or any(part in name for part in OF_THE_START):
                continue
            once = name not in ("epoch", "step", "max_steps")
            assert (row["step"], name) not in found or not once, f"{name} twice at {row['step']}"
            found[row["step"], name] = value
    return found


def weights_hash(run: Path) -> str:
    """SHA-256 of a run's final weights."""
    files = sorted((run / "model").glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
