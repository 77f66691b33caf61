"""Training of a small OPT in one process that adds up gradients in the order of a backend.

Rows of a step go to micro-batches as a trainer on two ranks deals them out. Gradients of micro-batches are the same
bits in every order; what differs is which are added first, and with it the last bits of the sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch

RANKS, MICRO_BATCHES, ROWS = 2, 2, 2
STEPS = 6
VOCABULARY = 600
Row = tuple[list[int], int]
Gradients = list[torch.Tensor]


def model(dtype: torch.dtype = torch.float32, activation: str = "relu", seed: int = 0) -> Any:
    """A small random OPT with tied embeddings and attention that is written out, the same on every call."""
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0, activation_function=activation,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train().to(dtype)


def steps(seed: int = 0) -> list[list[Row]]:
    """Global batches of rows (ids, first trained token), some with two trained tokens and some with sixty."""
    draw = random.Random(seed)

    def row() -> Row:
        prompt, answer = draw.randint(1, 20), draw.randint(1, draw.choice([2, 60]))
        return [2, *(draw.randrange(4, VOCABULARY) for _ in range(prompt + answer))], prompt + 1

    return [[row() for _ in range(RANKS * MICRO_BATCHES * ROWS)] for _ in range(STEPS)]


def micro_batch(batch: Sequence[Row], rank: int, number: int) -> Sequence[Row]:
    at = (number * RANKS + rank) * ROWS
    return batch[at : at + ROWS]


def trained_tokens(rows: Sequence[Row]) -> int:
    return sum(len(ids) - first for ids, first in rows)


def loss_sum(network: Any, rows: Sequence[Row]) -> torch.Tensor:
    """The sum of the trained tokens' losses over rows padded to the longest."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [1] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([[-100] * first + row[first:] + [-100] * (length - len(row)) for row, first in rows])
    logits = network(input_ids=ids, attention_mask=(ids != 1).long()).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _plus(one: Gradients, other: Gradients) -> Gradients:
    return [a + b for a, b in zip(one, other, strict=True)]


# `of[rank][number]` are the gradients of a micro-batch.
ORDERS: dict[str, Callable[[list[list[Gradients]]], Gradients]] = {
    # One process: micro-batch by micro-batch, as the rows come.
    "one": lambda of: reduce(_plus, [rank[k] for k in range(MICRO_BATCHES) for rank in of]),
    # DDP, FSDP2 and ZeRO-1: each rank over its micro-batches, and then the ranks.
    "ranks last": lambda of: reduce(_plus, [reduce(_plus, rank) for rank in of]),
    # ZeRO-2 and ZeRO-3, which keep no whole gradient: the ranks in each micro-batch, and then the micro-batches.
    "ranks first": lambda of: reduce(_plus, [reduce(_plus, [rank[k] for rank in of]) for k in range(MICRO_BATCHES)]),
}


def train(network: Any, order: str, lr: float = 1e-2, epsilon: float = 1e-8, seed: int = 0) -> list[float]:
    """AdamW without clipping over `steps`; the gradient norm of each step."""
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, eps=epsilon, weight_decay=0.0)
    norms = []
    for batch in steps(seed):
        tokens = trained_tokens(batch)
        of: list[list[Gradients]] = [[] for _ in range(RANKS)]
        for number in range(MICRO_BATCHES):
            for rank in range(RANKS):
                optimizer.zero_grad()
                (loss_sum(network, micro_batch(batch, rank, number)) / tokens).backward()
                of[rank].append([weight.grad for weight in weights])
        for weight, total in zip(weights, ORDERS[order](of), strict=True):
            weight.grad = total
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item())
        optimizer.step()
    return norms


class Units(torch.nn.Module):
    """A ReLU that keeps which units were open in each call, or that takes them from another run."""

    def __init__(self, given: Units | None = None) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []
        self._given = [] if given is None else [entered > 0 for entered in given.inputs]

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        opened = self._given[len(self.inputs)] if self._given else entering > 0
        self.inputs.append(entering.detach())
        return torch.where(opened, entering, 0.0)


def watch(network: Any, given: Sequence[Units | None] | None = None) -> list[Units]:
    """Replace the model's activations by `Units`."""
    layers = network.model.decoder.layers
    units = [Units(one) for one in given or [None] * len(layers)]
    for layer, activation in zip(layers, units, strict=True):
        layer.activation_fn = activation
    return units
