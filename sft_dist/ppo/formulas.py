"""The formulas of PPO for language models, each with its source. Nothing here knows of models or processes.

Sources: Schulman et al. 2016 (GAE), Schulman et al. 2017 (PPO), Ziegler et al. 2019 (fine-tuning from preferences),
Schulman 2020 (approximating KL divergence), Stiennon et al. 2020 (learning to summarise), Ouyang et al. 2022
(InstructGPT), Huang et al. 2024 (the N+ implementation details of RLHF with PPO).

Shapes: n responses, t tokens of the longest one. A mask is True where a response has a token, the one that ends it
included; what lies outside of it counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
# What keeps a deviation from being divided by zero, as in the code of Ziegler et al. 2019.
EPSILON = 1e-8


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (n, t) of tokens (n, t) under logits (n, t, vocabulary), in float32."""
    logits = logits.float()
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats (n, t) of the distributions of logits (n, t, vocabulary): log sum exp - sum p * logit."""
    logits = logits.float()
    # Large logits would leave few digits to the difference, and a shift changes no distribution.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def kl_of_tokens(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates (n, t) of KL(policy || reference) at tokens that the policy drew (Schulman 2020).

    With d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 are unbiased, k3 and k2
    never negative. k1 is that of Ziegler et al. 2019, equation 2.
    """
    d = log_probs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"no such estimator: {estimator}")


def scored(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards of tokens (n, t): -kl_coef * KL at each, and the score (n,) of the response at its last one.

    Ziegler et al. 2019, equation 2, spread over the tokens as in Stiennon et al. 2020.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    # A response without a token has nothing that could be rewarded.
    return rewards.scatter_add(1, last.clamp(min=0), torch.where(last >= 0, scores.unsqueeze(1), 0.0))


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns, each (n, t) (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma * V_{t+1} - V_t, with V = 0 behind the last token; A_t = delta_t + gamma * lam * A_{t+1};
    returns = A + V.
    """
    values = torch.where(mask, values, 0.0)
    rewards = torch.where(mask, rewards, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0.0)
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over what the mask has; zero where it has nothing."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def whitened(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values (n, t) of variance one, and of mean zero unless `shift_mean` is off; zero outside of the mask.

    Over all tokens of the rollout, with the biased variance, as in the code of Ziegler et al. 2019.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    white = (values - mean) * torch.rsqrt(variance + EPSILON)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def policy_losses(
    log_probs: Tensor, old: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The clipped loss of each token, (n, t), and where clipping decided it (Schulman et al. 2017, equation 7).

    max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange)) with ratio = exp(log_probs - old).
    """
    ratio = torch.exp(log_probs - old)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(
    values: Tensor, old: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Half the squared error of each value, (n, t), and where clipping decided it.

    The larger one of the error of the value and of the value clipped to `cliprange` around the rollout's own, which
    keeps a step from moving it far (Huang et al. 2024, detail "value function clipping").
    """
    plain = (values - returns).square()
    if cliprange is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    moved = values - old
    clipped = (old + moved.clamp(-cliprange, cliprange) - returns).square()
    # Within the range the two differ by rounding, which is no clipping.
    return torch.maximum(plain, clipped) / 2, (clipped > plain) & (moved.abs() > cliprange)


def approximate_kl(log_probs: Tensor, old: Tensor) -> Tensor:
    """Half the squared log-ratio of each token, (n, t): how far updates have moved from the rollout's policy (k2)."""
    return (log_probs - old).square() / 2


@dataclass
class AdaptiveKL:
    """The weight of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + e * episodes / horizon, as if a rollout of more episodes
    than the horizon had just as many: five times as many could make it negative.
    """

    coefficient: float
    target: float | None
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """After a rollout. `kl`: nats of a response, the mean of the rollout."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * min(episodes / self.horizon, 1.0)


@dataclass
class Moments:
    """Mean and deviation of all scores so far, put together rollout by rollout (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> None:
        """Take in the scores of a rollout, (n,)."""
        new = int(scores.numel())
        mean = float(scores.double().mean())
        squares = float((scores.double() - mean).square().sum())
        total = self.count + new
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * new / total
        self.mean += shift * new / total
        self.count = total

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores (n,) less the mean, in deviations (biased)."""
        deviation = (self.squares / max(self.count, 1)) ** 0.5
        found: Tensor = (scores - self.mean) / (deviation + EPSILON)
        return found


def beyond_target(lengths: Tensor, target: int | None, penalty: float) -> Tensor:
    """What is taken off the score of each response, (n,), for the tokens that it has beyond the target."""
    if target is None:
        return torch.zeros(lengths.shape, dtype=torch.float64)
    return penalty * (lengths - target).clamp(min=0).double()
