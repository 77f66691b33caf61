"""What is told of pairs: sums of a training's global batches, and means over all held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sft_dist.config_stages import DPOSection
from sft_dist.dpo.losses import OF_TOKENS
from sft_dist.dpo.scoring import Scored, weights_of
from sft_dist.metrics import perplexity
from sft_dist.sums import Sums

# A sum each, and what it is divided by: pairs, tokens of the chosen side, those of the rejected one, or of both.
TRAINED = {
    "rewards/chosen": "pairs",
    "rewards/rejected": "pairs",
    "rewards/accuracies": "pairs",
    "rewards/margins": "pairs",
    "logps/chosen": "pairs",
    "logps/rejected": "pairs",
    "kl_k2": "chosen",
    "mean_token_accuracy": "chosen",
    "logits/chosen": "chosen",
    "logits/rejected": "rejected",
    "entropy": "tokens",
}
_DIVISORS = ("pairs", "chosen", "rejected", "tokens")
# Columns of what is measured of a held-out pair.
HELD_OUT = (
    "loss", "nll", "chosen", "rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "kl_k2", "kl",
)  # fmt: skip


def of_pairs(scored: Scored, beta: float) -> dict[str, torch.Tensor]:
    """What both kinds of measures say of each pair, (B,): TRL's names.

    `rewards`: beta * log(policy / reference) of the sides; `accuracies`: whether the chosen one's is larger; `margins`:
    by how much; `logps`: sums of log-probabilities; `kl_k2`: see :meth:`Scored.drift`.
    """
    pairs = scored.pairs
    chosen, rejected = beta * pairs.chosen_ratios.detach(), beta * pairs.rejected_ratios.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
        "kl_k2": scored.drift(),
    }


class PairSums(Sums):
    """Of what is logged of pairs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__((len(TRAINED) + len(_DIVISORS),), device)

    def add(self, scored: Scored, beta: float, tokens: Mapping[str, torch.Tensor]) -> None:
        """Count a micro-batch. `tokens`: `entropy`, `mean_logits`, `is_top1` of each token, (2 B, T - 1)."""
        pairs, mask = scored.pairs, scored.mask
        half = len(scored)
        counted = {name: value.detach() * mask for name, value in tokens.items()}
        found = of_pairs(scored, beta) | {
            "mean_token_accuracy": counted["is_top1"][:half],
            "logits/chosen": counted["mean_logits"][:half],
            "logits/rejected": counted["mean_logits"][half:],
            "entropy": counted["entropy"],
        }
        divisors = (torch.tensor(half), pairs.chosen_tokens, pairs.rejected_tokens, mask)
        parts = [found[name] for name in TRAINED] + list(divisors)
        self.values += torch.stack([part.sum(dtype=torch.float64).to(self.values.device) for part in parts])

    def look(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means since the last look. `over_ranks`: see `take`."""
        total = self.take(over_ranks)
        divisors = dict(zip(_DIVISORS, total[len(TRAINED) :], strict=True))
        return {
            name: value / divisors[by]
            for (name, by), value in zip(TRAINED.items(), total[: len(TRAINED)], strict=True)
            if divisors[by]
        }


def held_out_row(scored: Scored, losses: torch.Tensor, settings: DPOSection, kl: torch.Tensor | None) -> torch.Tensor:
    """What is measured of each held-out pair, (B, columns), float64.

    `losses`: the weighted sum of its losses that are means over pairs. `kl`: the sum over the chosen completion's
    tokens of KL(policy || reference), NaN where there is no reference to ask.
    """
    pairs = scored.pairs
    found = of_pairs(scored, settings.beta) | {
        "loss": losses,
        "nll": scored.chosen_nll(),
        "chosen": pairs.chosen_tokens,
        "rejected": pairs.rejected_tokens,
        "kl": torch.full_like(losses, torch.nan) if kl is None else kl,
    }
    return torch.stack([found[name].detach().double() for name in HELD_OUT], dim=1)


def held_out_means(rows: torch.Tensor, settings: DPOSection) -> dict[str, Any]:
    """The measures of all held-out pairs, from their rows, (pairs, columns).

    Means over pairs; `kl_k2`, `kl` and `nll`, whose exponential is `perplexity`, over the tokens of the chosen
    completions. `kl`, over the whole vocabulary at each of those tokens, is left out where it is not known.
    """
    sums = dict(zip(HELD_OUT, rows.double().sum(0).tolist(), strict=True))
    pairs, tokens = max(len(rows), 1), max(sums["chosen"], 1.0)
    nll = sums["nll"] / tokens
    found = {name: sums[name] / pairs for name in TRAINED if name in sums and name != "kl_k2"}
    found |= {name: sums[name] / tokens for name in ("kl_k2", "kl") if sums[name] == sums[name]}
    loss = sums["loss"] / pairs + weights_of(settings).get(OF_TOKENS, 0.0) * nll
    return {"loss": loss, **found, "nll": nll, "perplexity": perplexity(nll), "tokens": int(sums["chosen"]),
            "records": len(rows)}  # fmt: skip
