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
        filled = {"input_ids": self.pad_token_id, "labels": IGNORE, "attention_mask": 0, **_of_sources(rows[0])}
        batch = {name: torch.full((len(rows), width), fill) for name, fill in filled.items()}
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][number, :length] = torch.as_tensor(row["input_ids"])
            batch["labels"][number, :length] = torch.as_tensor(row["labels"])
            batch["attention_mask"][number, :length] = 1
            if "source" in row:
                batch["sources"][number] = row["source"]
        return batch


@dataclass(frozen=True)
class Collator:
    """The collator of a training: rows of several documents are packed, single ones and held-out rows are padded.

    A training row is a list of documents (see `DocumentRows`), a held-out row is a document. `packed`: the training
    rows are packed, even those of one document, so that all batches of a run are of one kind. `length`: the width of
    packed rows, that of the longest where it is None.
    """

    pad_token_id: int
    packed: bool = False
    length: int | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        if isinstance(rows[0], Mapping):
            return PaddingCollator(self.pad_token_id)(rows)
        if self.packed:
            return PackedCollator(self.pad_token_id, self.length)(rows)
        return PaddingCollator(self.pad_token_id)([document for (document,) in rows])


@dataclass(frozen=True)
class PackedCollator:
    """Lays the rows of a pack, each a whole document, one behind the other, and pads on the right.

    Takes packs, each a list of rows, and returns int64 tensors, each (packs, longest pack or `length`):
    `input_ids`; `labels`; `position_ids`, which begin at 0 with each document; `document_ids`, 1 for the first
    document of a pack. Padding is document 0 with positions of its own, so that it attends to itself: a token that
    attends to nothing would be a softmax over nothing, whose NaN the gradient of every token would share.
    `length`: one width for all batches, which compiled kernels want. Raises ValueError when a pack is longer.
    """

    pad_token_id: int
    length: int | None = None

    def __call__(self, packs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, torch.Tensor]:
        longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
        width = longest if self.length is None else self.length
        if longest > width:
            raise ValueError(f"a pack of {longest} tokens does not fit into rows of {width}")
        filled = {"input_ids": self.pad_token_id, "labels": IGNORE, "document_ids": 0, "position_ids": 0}
        filled |= _of_sources(packs[0][0])
        batch = {name: torch.full((len(packs), width), fill) for name, fill in filled.items()}
        for number, pack in enumerate(packs):
            self._lay(pack, {name: tensor[number] for name, tensor in batch.items()})
        return batch

    @staticmethod
    def _lay(pack: Sequence[Mapping[str, Any]], into: Mapping[str, torch.Tensor]) -> None:
        end = 0
        for document, row in enumerate(pack, start=1):
            start, end = end, end + len(row["input_ids"])
            into["input_ids"][start:end] = torch.as_tensor(row["input_ids"])
            into["labels"][start:end] = torch.as_tensor(row["labels"])
            # The last token of the document before it would have to predict it.
            into["labels"][start : min(start + 1, end)] = IGNORE
            into["document_ids"][start:end] = document
            into["position_ids"][start:end] = torch.arange(end - start)
            if "source" in row:
                into["sources"][start:end] = row["source"]
        into["position_ids"][end:] = torch.arange(len(into["position_ids"]) - end)


def _of_sources(row: Mapping[str, Any]) -> dict[str, int]:
    """Rows of a mixture tell their source, and the batch then has `sources`, the source of each token."""
    return {"sources": 0} if "source" in row else {}
