"""Loss and perplexity over response tokens, summed over tokens and not averaged over batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from sft_dist.data.collate import PaddingCollator
from sft_dist.data.masking import IGNORE
from sft_dist.metrics import perplexity
from sft_dist.render.comparison import Measure


@torch.no_grad()
def row_nll(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of each row's trained tokens.

    `batch` holds input_ids, labels and attention_mask, each (rows, length). Returns float64 (rows, 2): the sum
    in nats and the number of tokens it is over.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    sums = [
        # Row by row: the fp32 copy of a whole batch's logits would be the largest tensor of the run.
        functional.cross_entropy(row[:-1].float(), target, ignore_index=IGNORE, reduction="none").double().sum()
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(sums), (labels != IGNORE).sum(dim=1).double()], dim=1)


def measure(stats: torch.Tensor) -> Measure:
    """Loss and perplexity of stacked :func:`row_nll` results, shape (rows, 2)."""
    total, tokens = stats.double().sum(dim=0).tolist()
    loss = total / max(tokens, 1.0)
    return Measure(perplexity=perplexity(loss), loss=loss, tokens=int(tokens), records=len(stats))


def measure_rows(model: torch.nn.Module, rows: Any, pad_token_id: int, batch_size: int, device: Any) -> Measure:
    """Loss and perplexity of prepared rows on one process. Rows of like length share a batch."""
    model.eval()
    collate = PaddingCollator(pad_token_id)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    stats = []
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        stats.append(row_nll(model, {k: v.to(device) for k, v in batch.items()}).cpu())
    return measure(torch.cat(stats))
