"""Preference rows to batches: both sides of each pair, and filler that counts for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    import datasets

    from sft_dist.dpo.precomputed import Table

Batch = dict[str, torch.Tensor]
_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


class PairRows(Dataset[dict[str, Any]]):
    """Prepared pairs; the index is what `GlobalOrder` gives: a row of one document, or none, which is filler.

    `table`: the reference's log-probabilities, where they were computed beforehand.
    """

    def __init__(self, rows: datasets.Dataset, count: int, filler_token: int, table: Table | None = None) -> None:
        self.rows = rows.select_columns(_COLUMNS).with_format("numpy")
        self.count, self.table = count, table
        self.filler = {name: [filler_token] for name in _COLUMNS} | {"is_filler": True}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, documents: int | Iterable[int]) -> dict[str, Any]:
        numbers = [documents] if isinstance(documents, int) else list(documents)
        if not numbers:
            return self.filler
        (number,) = numbers
        row: dict[str, Any] = dict(self.rows[int(number)])
        if self.table is not None:
            row["ref_chosen"], row["ref_rejected"] = self.table.of_row(int(number))
        return row


@dataclass(frozen=True)
class PairCollator:
    """Pads on the right to the longest side of the batch; the chosen sides come first, then the rejected ones.

    Returns, for B pairs of at most T tokens a side: int64 `input_ids`, `attention_mask` and `completion_mask`, each
    (2 B, T); bool `is_pair` (B,), False for filler, whose completion mask is empty; and, where the reference was
    computed beforehand, fp32 `ref_log_probs` (2 B, T - 1), the log-probability of each token but the first, 0 where it
    is no completion's.
    """

    pad_token_id: int
    precomputed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
        width = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row, side in sides)
        filled = {"input_ids": self.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        batch = {name: torch.full((len(sides), width), fill) for name, fill in filled.items()}
        if self.precomputed:
            batch["ref_log_probs"] = torch.zeros(len(sides), width - 1)
        for number, (row, side) in enumerate(sides):
            prompt, completion = len(row["prompt_ids"]), len(row[f"{side}_ids"])
            batch["input_ids"][number, :prompt] = torch.as_tensor(row["prompt_ids"])
            batch["input_ids"][number, prompt : prompt + completion] = torch.as_tensor(row[f"{side}_ids"])
            batch["attention_mask"][number, : prompt + completion] = 1
            if not row.get("is_filler"):
                batch["completion_mask"][number, prompt : prompt + completion] = 1
            if f"ref_{side}" in row:
                # No token predicts the first one of a row.
                first = max(prompt, 1)
                known = torch.as_tensor(row[f"ref_{side}"])[first - prompt :]
                batch["ref_log_probs"][number, first - 1 : first - 1 + len(known)] = known
        batch["is_pair"] = torch.tensor([not row.get("is_filler") for row in rows])
        return batch
