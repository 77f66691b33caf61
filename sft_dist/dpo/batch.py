"""Preference rows to batches of completions, with what the reference was found to say of them beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.data import pair_batches

if TYPE_CHECKING:
    import datasets

    from sft_dist.data.order import Row
    from sft_dist.dpo.precomputed import Table

Batch = dict[str, torch.Tensor]
_SIDES = ("chosen", "rejected")


class PairRows(pair_batches.PairRows):
    """As the base class. `table`: the reference's log-probabilities, where they were computed beforehand."""

    def __init__(self, rows: datasets.Dataset, count: int, filler_token: int, table: Table | None = None) -> None:
        super().__init__(rows, count, filler_token)
        self.table = table

    def __getitem__(self, row: Row) -> dict[str, Any]:
        pair = dict(super().__getitem__(row))
        if row and self.table is not None:
            pair["ref_chosen"], pair["ref_rejected"] = self.table.of_row(int(row[0]))
        return pair


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs on the right to the longest side of the batch, all chosen sides first.

    Returns, for B pairs of at most T tokens a side: int64 `input_ids`, `attention_mask` and `completion_mask`, each
    (2 B, T); bool `is_pair`, (B,), False for filler, which has no completions; and, where the reference was asked
    beforehand, `ref_log_probs`, (2 B, T - 1), the log-probability of each token but the first, 0 where it is no
    completion's, as the bits of float32 in int32 (see `known_log_probs`).
    """

    pad_token_id: int
    precomputed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        sides = [(row, side) for side in _SIDES for row in rows]
        width = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row, side in sides)
        filled = {"input_ids": self.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        batch = {name: torch.full((len(sides), width), fill) for name, fill in filled.items()}
        known = torch.zeros(len(sides), width - 1)
        for number, (row, side) in enumerate(sides):
            start = len(row["prompt_ids"])
            stop = start + len(row[f"{side}_ids"])
            batch["input_ids"][number, :start] = torch.as_tensor(row["prompt_ids"])
            batch["input_ids"][number, start:stop] = torch.as_tensor(row[f"{side}_ids"])
            batch["attention_mask"][number, :stop] = 1
            batch["completion_mask"][number, start:stop] = 1
            if f"ref_{side}" in row:
                known[number, start - 1 : stop - 1] = torch.as_tensor(row[f"ref_{side}"])
        batch["is_pair"] = torch.tensor([not row.get("is_filler") for row in rows])
        if self.precomputed:
            # DeepSpeed rounds every floating number of a batch to the type of its weights.
            batch["ref_log_probs"] = known.view(torch.int32)
        return batch


def known_log_probs(batch: Batch) -> torch.Tensor | None:
    """What the reference was found to say beforehand, fp32, (2 B, T - 1), or None."""
    return batch["ref_log_probs"].view(torch.float32) if "ref_log_probs" in batch else None
