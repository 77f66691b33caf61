"""Rows to a padded batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft_dist.data.masking import IGNORE


@dataclass(frozen=True)
class PaddingCollator:
    """Pads on the right to the longest row of the batch.

    Returns int64 tensors `input_ids`, `labels` and `attention_mask`, each (rows, longest row).
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        filled = {"input_ids": self.pad_token_id, "labels": IGNORE, "attention_mask": 0}
        batch = {name: torch.full((len(rows), width), fill) for name, fill in filled.items()}
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][number, :length] = torch.as_tensor(row["input_ids"])
            batch["labels"][number, :length] = torch.as_tensor(row["labels"])
            batch["attention_mask"][number, :length] = 1
        return batch
