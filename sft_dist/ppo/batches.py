"""Prompts with their responses as models are given them, padded or packed, and where the responses are found again.

Packed rows are as long as the longest response with its prompt, and hold whole ones. How a model is told of the borders
within a row is the business of `sft_dist.attention`, and proven on the policy before it is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft_dist.attention import Way, feed
from sft_dist.data.collate import PackedCollator
from sft_dist.data.packing import pack
from sft_dist.ppo.sampling import Ids

Batch = dict[str, torch.Tensor]
_FED = ("input_ids", "position_ids", "document_ids")


def batch_of(prompts: Sequence[Ids], responses: Sequence[Ids], pad: int, packed: bool = False) -> Batch:
    """Prompts, which have tokens, each with its response behind it, but for the last token, which predicts nothing.

    `input_ids`, `position_ids` and `document_ids` (0 for padding) are (rows, length), and without `packed` a row is a
    response with its prompt. `responses` and `mask` are (responses, longest response), and `before` has the same shape:
    where the token before each of the response's is, counted through the rows.
    """
    documents = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
    rows = _packs([len(document) for document in documents]) if packed else [[n] for n in range(len(documents))]
    # Nothing here has labels.
    laid = [[{"input_ids": documents[n], "labels": documents[n]} for n in row] for row in rows]
    batch = {name: value for name, value in PackedCollator(pad)(laid).items() if name in _FED}
    width, right = batch["input_ids"].shape[1], max(1, *map(len, responses))
    given = torch.full((len(documents), right), pad)
    mask = torch.zeros(given.shape, dtype=torch.bool)
    before = torch.zeros(given.shape, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = number * width
        for n in row:
            length = len(responses[n])
            given[n, :length] = torch.tensor(responses[n], dtype=torch.int64)
            mask[n, :length] = True
            first = start + len(prompts[n]) - 1
            before[n, :length] = torch.arange(first, first + length)
            start += len(documents[n])
    return batch | {"responses": given, "mask": mask, "before": before}


def _packs(lengths: list[int]) -> list[list[int]]:
    packs = pack(lengths, max(lengths), seed=0)
    return [packs[row].tolist() for row in range(len(packs))]


def inputs_of(model: Any, batch: Batch, way: Way | None) -> dict[str, Any]:
    """What a model's forward is given for a batch. `way`: how packed rows are fed; None: rows are not packed."""
    if way is not None:
        return feed({name: batch[name] for name in _FED}, way, model.config, bare(model).dtype)
    fed = {"input_ids": batch["input_ids"], "attention_mask": (batch["document_ids"] > 0).long(), "use_cache": False}
    # Some models have positions from the tokens' distances alone.
    if "position_ids" in inspect.signature(type(bare(model)).forward).parameters:
        fed["position_ids"] = batch["position_ids"]
    return fed


def selected(hidden: torch.Tensor, batch: Batch, way: Way | None) -> torch.Tensor:
    """Of what a model has for each token of a batch, (rows, length, width), that before each token of the responses.

    Returns (responses, longest response, width).
    """
    at = batch["before"]
    if way is Way.VARLEN:
        # All rows are one by then, without their padding.
        at = (batch["document_ids"] > 0).flatten().cumsum(0)[at] - 1
    return hidden.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, -1)


@contextmanager
def selecting(head: nn.Module, batch: Batch, way: Way | None) -> Iterator[list[torch.Tensor]]:
    """Have the head of a language model see nothing but what is before the responses' tokens while this is open.

    The list is filled with what it saw. The model itself calls the head, so that what it does with logits is done, and
    weights that are sharded are gathered.
    """
    seen: list[torch.Tensor] = []

    def select(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append(selected(given[0], batch, way))
        return (seen[-1],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        hook.remove()


def bare(model: Any) -> Any:
    """A model without the adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
