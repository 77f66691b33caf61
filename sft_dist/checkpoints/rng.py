"""The states of all random generators of a process, as JSON."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, those of this process's GPU too."""
    version, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    held: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, [int(key) for key in keys], place, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        held["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return held


def restore(held: dict[str, Any]) -> None:
    """Put all generators where they were."""
    version, numbers, gauss = held["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = held["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_state(held["torch"]))
    if "cuda" in held and torch.cuda.is_available():
        torch.cuda.set_rng_state(_state(held["cuda"]))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn inside leaves the generators as they were."""
    held = capture()
    try:
        yield
    finally:
        restore(held)


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
