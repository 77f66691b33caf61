"""What the models say of a batch of pairs: log-probabilities of its tokens, their sums, and the divergence from the
reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import log_softmax

from sft_dist.config_stages import DPOSection
from sft_dist.data.masking import IGNORE
from sft_dist.dpo.batch import Batch
from sft_dist.dpo.losses import OF_TOKENS, Pairs, loss_of


def inputs_of(batch: Batch) -> Batch:
    """What a model with TRL's fused head takes: it gives the log-probabilities of the completions and no logits."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """fp32 log-probability of each token but the first, 0 where it is no completion's, (2 B, T - 1)."""
    found: torch.Tensor = model(**inputs_of(batch), use_cache=False, fused_lm_head=True).log_probs
    return found.float()


def token_weights(mask: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """The weight of each token in the sum of its completion, (2 B, T - 1).

    With `alpha`, tokens beyond the length of the shorter side count alpha (LD-DPO, Liu et al. 2024, eq. 10).
    `mask`: whether a token is a completion's, (2 B, T - 1).
    """
    if alpha is None:
        return mask.float()
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    return torch.where(mask.cumsum(1) <= shared[:, None], 1.0, alpha) * mask


@dataclass(frozen=True)
class Scored:
    """A batch of pairs without its filler, B in all.

    `pairs`: sums of log-probabilities, float64. `policy`, `reference`: log-probabilities of the tokens, (2 B, T - 1);
    `mask`: which of them are completions'. The policy's alone have gradients.
    """

    pairs: Pairs
    policy: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, policy: torch.Tensor, reference: torch.Tensor, settings: DPOSection) -> Scored:
        """From the log-probabilities of policy and reference, (2 B, T - 1)."""
        real = batch["is_pair"].repeat(2)
        mask = batch["completion_mask"][real, 1:].bool()
        policy, reference = policy[real], reference[real].float()
        weights = token_weights(mask, settings.ld_alpha)
        # Of hundreds of nats, in which the few that the two differ by would lose their digits.
        sums = [(model * weights).sum(1, dtype=torch.float64) for model in (policy, reference)]
        sides = [side for total in sums for side in total.chunk(2)]
        return cls(Pairs(*sides, *mask.sum(1).chunk(2)), policy, reference, mask)

    def __len__(self) -> int:
        return len(self.mask) // 2

    def chosen_nll(self) -> torch.Tensor:
        """Negative log-likelihood of each chosen completion, (B,)."""
        return -self.policy[: len(self)].sum(1)

    def drift(self) -> torch.Tensor:
        """Sum over the tokens of each chosen completion of (log policy / reference)^2 / 2, (B,).

        Schulman's estimator k2 of the KL divergence (http://joschu.net/blog/kl-approx.html), over tokens of the data
        where it wants tokens drawn from the policy: it is 0 where the two agree, and tells how far they are apart.
        """
        apart = (self.policy - self.reference)[: len(self)].detach()
        return apart.pow(2).sum(1) / 2


def weighted_losses(scored: Scored, settings: DPOSection, confidence: torch.Tensor | None) -> torch.Tensor:
    """The sum of all losses of each pair that are means over pairs, in their weights, (B,), float64.

    `confidence`: a factor of each pair (see `confidences`).
    """
    total = torch.zeros(len(scored), dtype=torch.float64, device=scored.policy.device)
    for kind, weight in weights_of(settings).items():
        if kind != OF_TOKENS:
            loss = loss_of(kind, scored.pairs, settings)
            total = total + weight * (loss if confidence is None else loss * confidence)
    return total


def weights_of(settings: DPOSection) -> dict[str, float]:
    """The weight of each loss by its name."""
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    return dict(zip(settings.loss_type, weights, strict=True))


def confidences(scored: Scored, log_sum_squares: torch.Tensor) -> torch.Tensor:
    """How likely the policy is to write the pair itself, (B,), without gradient (WPO, Zhou et al. 2024, eq. 2).

    The product over both sides of exp(mean over tokens of log p - log sum_v p_v^2), where `log_sum_squares` is the
    latter for each token, (2 B, T - 1).
    """
    aligned = (scored.policy.detach() - log_sum_squares) * scored.mask
    chosen, rejected = (aligned.sum(1) / scored.mask.sum(1).clamp(min=1)).exp().chunk(2)
    return chosen * rejected


@torch.no_grad()
def divergence(policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over the tokens of each row of KL(policy || reference), over the whole vocabulary, (rows,) in nats.

    `policy`, `reference`: logits, (rows, T, vocabulary); `mask`: which tokens count, (rows, T).
    """
    sums = []
    for ours, theirs, counted in zip(policy[:, :-1], reference[:, :-1], mask[:, 1:].bool(), strict=True):
        # Row by row: fp32 copies of a whole batch's logits would be the largest tensors of the run.
        mine = log_softmax(ours[counted].float(), dim=-1)
        apart = mine - log_softmax(theirs[counted].float(), dim=-1)
        sums.append((mine.exp() * apart).sum().double())
    return torch.stack(sums)
