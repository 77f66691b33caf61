"""Random generators that are put back draw the same numbers again, whatever they had drawn."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch

from sft_dist.checkpoints import rng


def draws() -> list[object]:
    """Of each generator, normal numbers too: those are drawn in pairs, of which one is kept."""
    drawn = [torch.rand(3).tolist(), torch.randn(5).tolist(), np.random.random(3).tolist(), np.random.normal()]
    return [random.random(), random.gauss(), *drawn]


@pytest.fixture(autouse=True)
def _others_undisturbed() -> object:
    with rng.undisturbed():
        yield


@pytest.mark.parametrize("before", [0, 1, 2, 700])
def test_a_state_comes_back_through_json(before: int) -> None:
    for _ in range(before):
        draws()
    held = json.loads(json.dumps(rng.capture()))
    expected = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    assert [draws() for _ in range(3)] != expected
    rng.restore(held)
    assert [draws() for _ in range(3)] == expected


def test_what_is_drawn_meanwhile_disturbs_nothing() -> None:
    held = rng.capture()
    expected = draws()
    rng.restore(held)
    with contextlib.suppress(KeyError), rng.undisturbed():
        draws()
        raise KeyError
    assert draws() == expected
