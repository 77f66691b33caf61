"""The formulas of PPO once more, written from the papers: slow, one response and one token after another, in float64.

Responses are lists of their own length, so that nothing here has to know of padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Numbers = Sequence[float]


def log_softmax(logits: Numbers) -> list[float]:
    """log(exp(x_i) / sum_j exp(x_j))."""
    most = max(logits)
    total = sum(math.exp(logit - most) for logit in logits)
    return [logit - most - math.log(total) for logit in logits]


def entropy(logits: Numbers) -> float:
    """-sum_i p_i log p_i."""
    return -sum(math.exp(log_p) * log_p for log_p in log_softmax(logits) if log_p > -math.inf)


def kl_estimate(log_prob: float, reference: float, estimator: str) -> float:
    """Schulman 2020, whose r is reference over policy: -log r, (log r)^2 / 2, (r - 1) - log r."""
    log_r = reference - log_prob
    r = math.exp(log_r)
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": (r - 1) - log_r}[estimator]


def token_rewards(score: float, kl: Numbers, kl_coef: float) -> list[float]:
    """Ziegler et al. 2019, equation 2: the penalty where a token is drawn, the score where the response ends."""
    rewards = [-kl_coef * each for each in kl]
    if rewards:
        rewards[-1] += score
    return rewards


def advantages(rewards: Numbers, values: Numbers, gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, equation 16, summed as it stands: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    ends = len(rewards)
    later = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * later[t] - values[t] for t in range(ends)]
    return [sum((gamma * lam) ** l * deltas[t + l] for l in range(ends - t)) for t in range(ends)]  # noqa: E741


def discounted(rewards: Numbers, gamma: float) -> list[float]:
    """What is still to come at each token: sum_l gamma^l r_{t+l}."""
    return [sum(gamma**l * r for l, r in enumerate(rewards[t:])) for t in range(len(rewards))]  # noqa: E741


def whitened(rows: Sequence[Numbers], shift_mean: bool) -> list[list[float]]:
    """(x - mean) / deviation over all tokens of all responses; with the mean put back unless it is to go."""
    every = [x for row in rows for x in row]
    mean = sum(every) / len(every)
    variance = sum((x - mean) ** 2 for x in every) / len(every)
    back = 0.0 if shift_mean else mean
    return [[(x - mean) / math.sqrt(variance + 1e-8) + back for x in row] for row in rows]


def policy_loss(log_prob: float, old: float, advantage: float, cliprange: float) -> float:
    """Schulman et al. 2017, equation 7, turned into a loss: -min(r A, clip(r, 1 - e, 1 + e) A)."""
    ratio = math.exp(log_prob) / math.exp(old)
    clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
    return -min(ratio * advantage, clipped * advantage)


def policy_slope(log_prob: float, old: float, advantage: float, cliprange: float) -> float:
    """The derivative of `policy_loss` by the new log-probability: none where the ratio has gone far enough."""
    ratio = math.exp(log_prob - old)
    far_enough = ratio > 1 + cliprange if advantage > 0 else ratio < 1 - cliprange
    return 0.0 if far_enough else -advantage * ratio


def value_loss(value: float, old: float, target: float, cliprange: float | None) -> float:
    """Half of max((V - R)^2, (V_clipped - R)^2), V_clipped within `cliprange` of the rollout's value."""
    errors = [(value - target) ** 2]
    if cliprange is not None:
        errors.append((min(max(value, old - cliprange), old + cliprange) - target) ** 2)
    return max(errors) / 2


def mean_and_deviation(scores: Numbers) -> tuple[float, float]:
    """Of all scores at once; the deviation is the biased one."""
    mean = sum(scores) / len(scores)
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
