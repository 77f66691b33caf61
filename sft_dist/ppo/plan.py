"""How prompts and optimizer steps are dealt out to rollouts, epochs over a rollout and mini-batches of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Sampler

from sft_dist.config import Recipe
from sft_dist.data.arrangement import generator
from sft_dist.data.order import Row
from sft_dist.errors import UserError


@dataclass(frozen=True)
class Plan:
    """`prompts` of the data, `rollout` of them to a rollout, `epochs` over it, `mini_batches` of `rows` responses each.

    `rollouts` in the whole training. Everything is a function of these numbers and the seed.
    """

    prompts: int
    rollout: int
    epochs: int
    mini_batches: int
    rollouts: int
    seed: int

    @property
    def rows(self) -> int:
        """Responses of an optimizer step."""
        return self.rollout // self.mini_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that are made from a rollout."""
        return self.epochs * self.mini_batches

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.rollouts * self.steps_per_rollout

    def prompts_of(self, number: int) -> list[int]:
        """The prompts of a rollout: one pass after the other over all of them, each in an order of its own."""
        start, found = number * self.rollout, []
        for place in range(start, start + self.rollout):
            found.append(int(self._pass(place // self.prompts)[place % self.prompts]))
        return found

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            self._passes.clear()
            self._passes[number] = generator(self.seed, number).permutation(self.prompts)
        return self._passes[number]

    @property
    def _passes(self) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = self.__dict__.setdefault("_held_passes", {})
        return found

    def mini_batch(self, step: int) -> list[int]:
        """The responses of an optimizer step, counted from 0, as places in its rollout."""
        number, within = divmod(step, self.steps_per_rollout)
        epoch, place = divmod(within, self.mini_batches)
        order = generator(self.seed, 1, number, epoch).permutation(self.rollout)
        found: list[int] = order[place * self.rows : (place + 1) * self.rows].tolist()
        return found


def plan_of(recipe: Recipe, prompts: int, rows: int) -> Plan:
    """The plan of a recipe. `rows`: responses of an optimizer step, over all ranks. Raises :class:`UserError`."""
    settings, train = recipe.ppo, recipe.train
    rollout, mini_batches = settings.rollout_batch_size, settings.num_mini_batches
    if rollout is None:
        rollout = rows * (mini_batches or 1)
    if rollout % rows or (mini_batches is not None and rollout != rows * mini_batches):
        wanted = f"ppo.num_mini_batches={mini_batches} of them" if mini_batches else "a multiple of that"
        raise UserError(
            f"ppo.rollout_batch_size: {rollout} prompts do not divide into mini-batches of {rows} responses; make it "
            f"{wanted} ({rows * (mini_batches or math.ceil(rollout / rows))}), or change parallel.global_batch_size"
        )
    mini_batches = rollout // rows
    each = settings.num_ppo_epochs * mini_batches
    if train.max_steps > 0:
        if train.max_steps % each:
            raise UserError(
                f"train.max_steps: {train.max_steps} is no whole number of rollouts, each of {each} steps "
                f"({settings.num_ppo_epochs} epochs of {mini_batches} mini-batches); take "
                f"{math.ceil(train.max_steps / each) * each}"
            )
        rollouts = train.max_steps // each
    else:
        rollouts = math.ceil(train.num_train_epochs * prompts / rollout)
    seed = train.seed if train.data_seed is None else train.data_seed
    return Plan(prompts, rollout, settings.num_ppo_epochs, mini_batches, rollouts, seed)


class Places(Dataset[int]):
    """The rows that a loader deals out to the ranks: which place of a mini-batch each takes, -1 for a filler."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps * self.plan.rows

    def __getitem__(self, row: int | Row) -> int:
        return row % self.plan.rows if isinstance(row, int) else -1


class PlacesInOrder(Sampler[int]):
    """All places, step by step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps * self.plan.rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """There is one."""
