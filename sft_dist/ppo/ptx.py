"""Records that are trained on as in SFT beside the rollouts (PPO-ptx, Ouyang et al. 2022, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.data.arrangement import Arrangement, DocumentRows, document_lengths
from sft_dist.data.collate import Collator
from sft_dist.data.masking import IGNORE
from sft_dist.data.order import GlobalOrder

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PtxBatch:
    """Rows of a step: the model's `inputs`, the `labels`, and the trained tokens of the step over all ranks."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    tokens: int

    def loss(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The part of the step's mean loss per trained token. `log_probs`: of all tokens but the first of each row."""
        return -torch.where(self.labels[:, 1:] != IGNORE, log_probs, 0.0).sum() / max(self.tokens, 1)


class Ptx:
    """As many records a step as there are responses, in an order that depends on the seed alone."""

    def __init__(self, rows: Dataset, per_step: int, seed: int, pad: int) -> None:
        arrangement = Arrangement(document_lengths(rows), None, seed)
        self._order = GlobalOrder(arrangement, per_step)
        self._documents = DocumentRows(rows, len(arrangement), pad)
        self._trained = rows["trained"]
        self._collate = Collator(pad)

    def batch(self, step: int, places: Sequence[int], device: Any) -> PtxBatch:
        """The rows at these places of a step, counted from 0; fillers where it has fewer rows."""
        rows = self._order.of_step(step + 1)
        mine = [rows[place] if 0 <= place < len(rows) else () for place in places]
        batch = {
            name: value.to(device) for name, value in self._collate([self._documents[row] for row in mine]).items()
        }
        labels = batch.pop("labels")
        return PtxBatch(batch, labels, sum(int(self._trained[row[0]]) for row in rows))
