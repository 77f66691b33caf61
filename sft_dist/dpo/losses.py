"""The losses of preference pairs, one value a pair, as functions of log-probabilities.

With c and r the log-ratios log(policy / reference) of the chosen and the rejected completion, and s(c), s(r) their
scores under an f-divergence (c and r themselves under the reverse KL), most losses are functions of
h = beta * (s(c) - s(r)). Names and defaults are those of TRL's `DPOConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu

from sft_dist.config_stages import DPOSection

# An exponential of more would leave fp32.
_LARGEST_EXPONENT = 80.0
# The one loss that is a mean over tokens; all others are means over pairs.
OF_TOKENS = "sft"


@dataclass(frozen=True)
class Pairs:
    """Sums of log-probabilities over the completions of pairs, under policy and reference, each (pairs,).

    `chosen_tokens`, `rejected_tokens`: how many tokens each sum is over.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_ratios(self) -> torch.Tensor:
        """c, (pairs,)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratios(self) -> torch.Tensor:
        """r, (pairs,)."""
        return self.rejected - self.ref_rejected


def scores(ratios: torch.Tensor, settings: DPOSection) -> torch.Tensor:
    """f'(u) of the log-ratios log u, up to a constant that a difference of scores is without (f-DPO, Wang et al. 2023,
    table 1): log u; -1/u; log(2u / (u + 1)); (u^(alpha - 1) - 1) / (alpha - 1)."""
    kind, alpha = settings.f_divergence_type, settings.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - torch.exp(-ratios)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * ratios).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)
    # The reverse KL, which the alpha-divergence goes to with alpha to 1.
    return ratios


def loss_of(kind: str, pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """One loss of each pair, (pairs,). `kind`: any of `dpo.loss_type` but that of tokens."""
    return _LOSSES[kind](pairs, settings)


def _gap(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """h, (pairs,)."""
    return settings.beta * (scores(pairs.chosen_ratios, settings) - scores(pairs.rejected_ratios, settings))


def _mean_gap(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """The difference of scores, each divided by the tokens of its completion, (pairs,)."""
    chosen = scores(pairs.chosen_ratios, settings) / pairs.chosen_tokens.clamp(min=1)
    return chosen - scores(pairs.rejected_ratios, settings) / pairs.rejected_tokens.clamp(min=1)


def sigmoid(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """-log sigma(h): DPO (Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(_gap(pairs, settings))


def sigmoid_norm(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """DPO over scores per token (Tülu 3, Lambert et al. 2024, section 5.1.2)."""
    return -logsigmoid(settings.beta * _mean_gap(pairs, settings))


def hinge(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """max(0, 1 - h): SLiC's calibration (Zhao et al. 2023) in the form of RSO (Liu et al. 2023, table 1)."""
    return relu(1 - _gap(pairs, settings))


def ipo(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """(difference of scores - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17), with scores per token as its authors do."""
    return (_mean_gap(pairs, settings) - 1 / (2 * settings.beta)) ** 2


def exo_pair(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """KL(p || q) of p = (sigma(h), sigma(-h)) to q = (1 - eps, eps) (EXO, Ji et al. 2024, eq. 16)."""
    gap, eps = _gap(pairs, settings), settings.label_smoothing
    chosen = gap.sigmoid() * (logsigmoid(gap) - math.log1p(-eps))
    return chosen + (-gap).sigmoid() * (logsigmoid(-gap) - math.log(eps))


def nca_pair(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """-log sigma(beta c) - (log sigma(-beta c) + log sigma(-beta r)) / 2 (NCA, Chen et al. 2024, section 3.2)."""
    chosen, rejected = settings.beta * pairs.chosen_ratios, settings.beta * pairs.rejected_ratios
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def robust(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """An unbiased loss where a share eps of the labels is flipped (Chowdhury et al. 2024, eq. 12)."""
    gap, eps = _gap(pairs, settings), settings.label_smoothing
    return (eps * logsigmoid(-gap) - (1 - eps) * logsigmoid(gap)) / (1 - 2 * eps)


def bco_pair(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """-log sigma(beta c) - log sigma(-beta r): BCO (Jung et al. 2024) without the shift of its rewards."""
    return -logsigmoid(settings.beta * pairs.chosen_ratios) - logsigmoid(-settings.beta * pairs.rejected_ratios)


def sppo_hard(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: SPPO (Wu et al. 2024, eq. 4.7), where the chosen always wins."""
    target = 1 / (2 * settings.beta)
    return (pairs.chosen_ratios - target) ** 2 + (pairs.rejected_ratios + target) ** 2


def apo_zero(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """1 - sigma(beta c) + sigma(beta r): the chosen up, the rejected down (APO, D'Oosterlinck et al. 2024, eq. 7)."""
    return (-settings.beta * pairs.chosen_ratios).sigmoid() + (settings.beta * pairs.rejected_ratios).sigmoid()


def apo_down(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """sigma(beta c) + 1 - sigma(beta (c - r)): both down, the rejected further (the same, eq. 8)."""
    apart = settings.beta * (pairs.chosen_ratios - pairs.rejected_ratios)
    return (settings.beta * pairs.chosen_ratios).sigmoid() + (-apart).sigmoid()


def discopop(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """(1 - m) * -log sigma(h) + m * exp(-h) with m = sigma(h / tau) (DiscoPOP, Lu et al. 2024, eq. 5)."""
    gap = _gap(pairs, settings)
    mixed = (gap / settings.discopop_tau).sigmoid()
    return -logsigmoid(gap) * (1 - mixed) + torch.exp(-gap) * mixed


def aot(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """Preference between distributions (AOT, Melnyk et al. 2024): log(chosen / rejected) of the policy and of the
    reference, each sorted over the pairs at hand, are compared rank by rank."""
    policy = torch.sort(pairs.chosen - pairs.rejected).values
    return _smoothed(policy - torch.sort(pairs.ref_chosen - pairs.ref_rejected).values, settings)


def aot_unpaired(pairs: Pairs, settings: DPOSection) -> torch.Tensor:
    """The same for c and r, each sorted over the pairs at hand."""
    return _smoothed(torch.sort(pairs.chosen_ratios).values - torch.sort(pairs.rejected_ratios).values, settings)


def _smoothed(apart: torch.Tensor, settings: DPOSection) -> torch.Tensor:
    eps, gap = settings.label_smoothing, settings.beta * apart
    return -(1 - eps) * logsigmoid(gap) - eps * logsigmoid(-gap)


_LOSSES: dict[str, Callable[[Pairs, DPOSection], torch.Tensor]] = {
    found.__name__: found
    for found in (sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero,
                  apo_down, discopop, aot, aot_unpaired)
}  # fmt: skip
