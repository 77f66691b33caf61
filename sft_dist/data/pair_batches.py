"""Pairs as the rows of a training and as padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from sft_dist.data.order import Row

if TYPE_CHECKING:
    import datasets

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")


class PairRows(Dataset[dict[str, Any]]):
    """Pairs by the rows that `GlobalOrder` gives, each of one number; the filler, of none, is a pair that is none."""

    def __init__(self, rows: datasets.Dataset, count: int, filler_token: int) -> None:
        self.rows = rows.select_columns(list(COLUMNS)).with_format("numpy")
        self.count = count
        self.filler = {"prompt_ids": [filler_token], "chosen_ids": [], "rejected_ids": [], "margin": None,
                       "is_filler": True}  # fmt: skip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: Row) -> dict[str, Any]:
        return self.rows[int(row[0])] if row else self.filler


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs on the right to the longest side of the batch.

    Returns tensors: `input_ids` and `attention_mask`, int64, (2 pairs, longest side), all chosen sides first; `margin`,
    (pairs,), 0 where the data have none, as the bits of float32 in int32, for DeepSpeed rounds every floating number
    of a batch to the type of its weights (see `margins_of`); `is_pair`, bool, (pairs,), false for filler.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sides = [[*row["prompt_ids"], *row[side]] for side in ("chosen_ids", "rejected_ids") for row in rows]
        width = max(map(len, sides))
        ids = torch.full((len(sides), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, side in enumerate(sides):
            ids[number, : len(side)] = torch.tensor(side)
            mask[number, : len(side)] = 1
        given = [row["margin"] for row in rows]
        # Without a value a column of Arrow is None, and NaN by way of NumPy.
        margins = torch.tensor([0.0 if value is None or value != value else float(value) for value in given])
        is_pair = torch.tensor([not row.get("is_filler", False) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "margin": margins.view(torch.int32), "is_pair": is_pair}


def margins_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The margins of a batch, float32, (pairs,)."""
    return batch["margin"].view(torch.float32)
