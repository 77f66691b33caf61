"""Reward models: TRL's trainer on pairs prepared by this project.

TRL's `RewardTrainer` is subclassed for the order of the rows, which must not depend on the number of processes; the
loss and the figures beside it, which must be means over the pairs of a global batch and not of micro-batches; dropout
that is off in every architecture; and checkpoints (see `Resumable`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from transformers import EvalPrediction

from sft_dist.adapters import left_in_fp32
from sft_dist.backend import Backend
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.order import GlobalOrder
from sft_dist.data.pair_batches import PairCollator, PairRows, margins_of
from sft_dist.metrics import flops_per_token
from sft_dist.models import switch_dropout_off
from sft_dist.sums import Sums
from sft_dist.trainers.ordered import Ordered, digest_of_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What is summed over pairs between two logs.
_SUMS = ("pairs", "accuracy", "margin", "reward", "squared_reward")


def pair_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor, centre: float | None
) -> torch.Tensor:
    """The loss of each pair by its two rewards, all (pairs,).

    -log sigmoid(r_chosen - r_rejected - margin) (Ouyang et al. 2022, eq. 1; the margin: Touvron et al. 2023, Llama 2,
    eq. 2), and `centre` (r_chosen + r_rejected)^2 (Eisenstein et al. 2023, eq. 2).
    """
    losses = -functional.logsigmoid(chosen - rejected - margin)
    return losses if centre is None else losses + centre * (chosen + rejected) ** 2


class _MeanOverPairs(trl.RewardTrainer):  # type: ignore[misc]
    """TRL's trainer with a loss that is the mean over the pairs of the global batch."""

    # `compute_loss` divides by the pairs of all micro-batches of all ranks.
    loss_is_scaled_for_ga = True

    def rewards(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards of the chosen and of the rejected sides, float32, (pairs,)."""
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = out.logits.squeeze(-1).float().chunk(2)
        return chosen, rejected

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """This rank's part of the mean; DDP, DeepSpeed and FSDP average over the ranks."""
        chosen, rejected = self.rewards(model, inputs)
        losses = pair_losses(chosen, rejected, margins_of(inputs), self.args.center_rewards_coefficient)
        self.count_rewards(chosen.detach(), rejected.detach(), inputs["is_pair"])
        return (losses * inputs["is_pair"]).sum() * self.args.world_size / kwargs["num_items_in_batch"]

    def count_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor, is_pair: torch.Tensor) -> None:
        """Take note of the rewards of a micro-batch."""
        raise NotImplementedError

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class RewardTrainer(Ordered, _MeanOverPairs):
    """TRL's trainer with an order of rows, a loss and figures that depend on no number of processes."""

    def __init__(self, model: PreTrainedModel, args: trl.RewardConfig, rows: Dataset, held_out: Dataset | None,
                 tokenizer: PreTrainedTokenizerBase, backend: Backend) -> None:  # fmt: skip
        self.begin_counting(backend)
        self._rows = rows
        self.held_out_rewards: NDArray[np.float64] | None = None
        self._held_out_order = None if held_out is None else np.argsort(-document_lengths(held_out), kind="stable")
        if args.disable_dropout:
            switch_dropout_off(model)
        with left_in_fp32(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                # Of like length, so that little is padded.
                eval_dataset=None if held_out is None else held_out.select(self._held_out_order),
                processing_class=tokenizer,
                data_collator=PairCollator(tokenizer.pad_token_id),
                compute_metrics=self._measured,
            )
        self.sums: Sums = Sums((len(_SUMS),), args.device)

    def arrange(self, arrangement: Arrangement, filler_token: int) -> None:
        """Settle what is trained on, before `train()`. `filler_token`: any but the pad token."""
        length = float(arrangement.lengths.mean())
        flops = flops_per_token(self.model, self.model.config, length, has_lm_head=False)
        self.order_rows(lambda: GlobalOrder(arrangement, self.rows_per_step), digest_of_rows(self._rows), flops)
        self._steps = GlobalOrder(arrangement, self.rows_per_step)
        self.train_dataset: TorchDataset[Any] = PairRows(self._rows, len(arrangement), filler_token)

    def samples_of_step(self) -> list[str]:
        """The file and number of each pair of the step."""
        return [
            str(self._rows[number]["where"]) for row in self._steps.of_step(self.state.global_step) for number in row
        ]

    def count_tokens(self, batches: list[Any]) -> tuple[int, int]:
        """As the base class. The reward is read off the last token of a side, and all before it are trained for it."""
        seen = 0
        for batch in batches:
            seen += int((batch["attention_mask"] * batch["is_pair"].repeat(2)[:, None]).sum())
        return seen, seen

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of a step, and the pairs of its global batch."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        own = sum(int(batch["is_pair"].sum()) for batch in batches)
        return batches, self.summed(torch.tensor(own, device=self.args.device))

    # What is logged: sums over pairs, so that filler has no part in it.

    def count_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor, is_pair: torch.Tensor) -> None:
        """As the base class."""
        if not self.model.training:
            return
        one, other = chosen[is_pair].double(), rejected[is_pair].double()
        found = [torch.ones_like(one), one > other, one - other, one + other, one**2 + other**2]
        self.sums.values += torch.stack([part.double().sum() for part in found])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy, margin and rewards, under the names of TRL's trainer."""
        if "loss" in logs:
            pairs, right, margin, reward, squared = self.sums.take(self.summed)
            if pairs:
                mean = reward / (2 * pairs)
                logs |= {"accuracy": right / pairs, "margin": margin / pairs, "mean_reward": mean,
                         "reward_std": max(squared / (2 * pairs) - mean**2, 0.0) ** 0.5}  # fmt: skip
        super().log(logs, start_time)

    # Held-out pairs.

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """The two rewards of each pair and its margin, so that every pair weighs the same."""
        self.leave_evaluation_if_asked()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            chosen, rejected = self.rewards(model, inputs)
        stats = torch.stack([chosen, rejected, margins_of(inputs)], dim=1).double()
        return None, stats, stats[:, 2]

    def _measured(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self._held_out_order is not None
        stats = np.asarray(prediction.predictions, np.float64)
        rewards = np.empty((len(stats), 2))
        rewards[self._held_out_order] = stats[:, :2]
        self.held_out_rewards = rewards
        chosen, rejected, margin = torch.from_numpy(stats).T
        losses = pair_losses(chosen, rejected, margin, self.args.center_rewards_coefficient)
        return {
            "loss": losses.mean().item(),
            "accuracy": (chosen > rejected).double().mean().item(),
            "margin": (chosen - rejected).mean().item(),
            "mean_reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "pairs": len(stats),
        }
