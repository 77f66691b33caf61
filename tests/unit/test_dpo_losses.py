"""The losses of DPO against formulas written out in NumPy, and against what TRL's own trainer makes of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sft_dist.config_stages import DPOSection
from sft_dist.dpo.losses import Pairs, loss_of
from sft_dist.dpo.scoring import token_weights

Floats = NDArray[np.float64]
PAIRS = 7


def drawn(seed: int = 0) -> tuple[dict[str, Floats], Pairs]:
    """Sums of log-probabilities, as NumPy has them and as the losses take them."""
    chance = np.random.default_rng(seed)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    sums = {name: -chance.uniform(1, 30, PAIRS) for name in names}
    sums |= {f"{side}_tokens": chance.integers(1, 40, PAIRS).astype(float) for side in ("chosen", "rejected")}
    return sums, Pairs(**{name: torch.tensor(value) for name, value in sums.items()})


def sigma(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def by_hand(kind: str, p: dict[str, Floats], s: DPOSection) -> Floats:
    c, r = p["chosen"] - p["ref_chosen"], p["rejected"] - p["ref_rejected"]
    beta, eps = s.beta, s.label_smoothing
    h = beta * (c - r)
    apart = c / p["chosen_tokens"] - r / p["rejected_tokens"]
    found: dict[str, Any] = {
        "sigmoid": lambda: -np.log(sigma(h)),
        "sigmoid_norm": lambda: -np.log(sigma(beta * apart)),
        "hinge": lambda: np.maximum(0, 1 - h),
        "ipo": lambda: (apart - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - eps) * np.log(sigma(h)) + eps * np.log(sigma(-h))) / (1 - 2 * eps),
        "exo_pair": lambda: sigma(h) * np.log(sigma(h) / (1 - eps)) + sigma(-h) * np.log(sigma(-h) / eps),
        "nca_pair": lambda: -np.log(sigma(beta * c)) - 0.5 * np.log(sigma(-beta * c)) - 0.5 * np.log(sigma(-beta * r)),
        "bco_pair": lambda: -np.log(sigma(beta * c)) - np.log(sigma(-beta * r)),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigma(beta * c) + sigma(beta * r),
        "apo_down": lambda: sigma(beta * c) + 1 - sigma(h),
        "discopop": lambda: (
            -np.log(sigma(h)) * (1 - sigma(h / s.discopop_tau)) + np.exp(-h) * sigma(h / s.discopop_tau)
        ),
        "aot": lambda: smoothed(
            np.sort(p["chosen"] - p["rejected"]) - np.sort(p["ref_chosen"] - p["ref_rejected"]), beta, eps
        ),
        "aot_unpaired": lambda: smoothed(np.sort(c) - np.sort(r), beta, eps),
    }
    return np.asarray(found[kind]())


def smoothed(apart: Floats, beta: float, eps: float) -> Floats:
    return np.asarray(-(1 - eps) * np.log(sigma(beta * apart)) - eps * np.log(sigma(-beta * apart)))


KINDS = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
         "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.1), (0.7, 0.3)])
def test_each_loss_is_its_formula(kind: str, beta: float, smoothing: float) -> None:
    settings = DPOSection(beta=beta, label_smoothing=smoothing, discopop_tau=0.2)
    for seed in range(3):
        sums, pairs = drawn(seed)
        found, expected = loss_of(kind, pairs, settings).numpy(), by_hand(kind, sums, settings)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_of_other_divergences(kind: str) -> None:
    """f'(u) of the ratio u = policy / reference, of which a loss takes the difference between the sides."""
    sums, pairs = drawn()
    settings = DPOSection(f_divergence_type=kind, f_alpha_divergence_coef=0.3)
    derivative = {
        "forward_kl": lambda u: -1 / u,
        "js_divergence": lambda u: np.log(2 * u / (1 + u)),
        "alpha_divergence": lambda u: (u ** (0.3 - 1) - 1) / (0.3 - 1),
    }[kind]
    # Ratios near 1: others leave the exponentials without digits.
    sums["ref_chosen"], sums["ref_rejected"] = sums["chosen"] / 1.1, sums["rejected"] / 0.9
    pairs = Pairs(**{name: torch.tensor(value) for name, value in sums.items()})
    u, v = np.exp(sums["chosen"] - sums["ref_chosen"]), np.exp(sums["rejected"] - sums["ref_rejected"])
    expected = np.log1p(np.exp(-0.1 * (derivative(u) - derivative(v))))
    np.testing.assert_allclose(loss_of("sigmoid", pairs, settings).numpy(), expected, rtol=1e-9)


def test_tokens_beyond_the_shorter_side_count_alpha() -> None:
    # Two pairs: sides of 2 and 4 tokens behind a prompt of one, then of 3 and 1.
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    expected = [[0, 1, 1, 0, 0], [0, 1, 0.25, 0.25, 0], [0, 1, 1, 0.25, 0.25], [0, 1, 0, 0, 0]]
    assert token_weights(mask, 0.25).tolist() == expected
    assert token_weights(mask, None).tolist() == mask.float().tolist()
