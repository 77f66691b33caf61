"""Makes rollouts: the ranks share out the prompts, answer them, have the answers looked at and rewarded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from sft_dist.config_stages import PPOSection
from sft_dist.data.formats import Conversation
from sft_dist.data.rows import turns_of
from sft_dist.errors import UserError
from sft_dist.ppo.batches import batch_of
from sft_dist.ppo.gathering import gathered
from sft_dist.ppo.names import reward_names
from sft_dist.ppo.rewards import FunctionReward, ModelReward, Texts, weighted
from sft_dist.ppo.rollout import Response, Rollout, put_together
from sft_dist.ppo.sampling import Ids, chances, respond

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from sft_dist.ppo.vllm import VLLM

Reward = ModelReward | FunctionReward


@dataclass(frozen=True)
class Prompts:
    """Prepared prompts (see `sft_dist.data.prompts`), read row by row."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, row: int) -> Ids:
        """The tokens of a prompt."""
        found: Ids = self.rows[row]["prompt_ids"]
        return found

    def turns(self, row: int) -> Conversation:
        """Its turns."""
        return turns_of(self.rows[row])

    def where(self, row: int) -> str:
        """The file and number of its record."""
        return str(self.rows[row]["where"])


class Roller:
    """Makes rollouts with a trainer's actors. All ranks call it together.

    `stops`: the tokens that end a response. `between` is called between batches, by all ranks alike, and may raise
    to leave the rollout; `alive` at every token. `vllm`: what generates in the place of transformers.
    """

    def __init__(
        self, trainer: Any, settings: PPOSection, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int],
        rewards: Sequence[Reward], seed: int, between: Callable[[], None], alive: Callable[[], None],
        vllm: VLLM | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.settings, self.tokenizer = trainer, settings, tokenizer
        self.stops, self.rewards, self.seed = stops, rewards, seed
        self.between, self.alive, self.vllm = between, alive, vllm
        self.seconds = 0.0

    def roll(self, number: int, prompts: Prompts, rows: Sequence[int], tag: int = 0) -> Rollout:
        """A rollout over some of the prompts. `tag` tells its chances from those of other rollouts of the number.

        Raises :class:`UserError`, on all ranks, where a reward function fails.
        """
        world, rank = self.trainer.args.world_size, self.trainer.args.process_index
        ids = [prompts.ids(row) for row in rows]
        # Prompts of like length in one batch; all ranks have as many batches, for they gather weights together.
        order = sorted(range(len(rows)), key=lambda place: (-len(ids[place]), place))
        order += [order[extra % len(order)] for extra in range(-len(order) % world)]
        mine = order[rank::world]
        size = self.settings.rollout_micro_batch_size or self.trainer.args.per_device_eval_batch_size
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        answered = self._parts(ids, self._answer(number, tag, ids, batches))
        found = [one for batch in answered for one in self._look(ids, batch)]
        self._reward(found, answered, prompts, rows, ids)
        every = {one.place: one for one in gather_object(found)}
        return put_together(number, list(rows), ids, list(every.values()))

    def _answer(self, number: int, tag: int, ids: list[Ids], batches: list[list[int]]) -> list[tuple[int, Ids]]:
        """The responses of this rank's batches, each with its place in the rollout."""
        began = time.perf_counter()
        settings, trainer = self.settings, self.trainer
        found: list[tuple[int, Ids]] = []
        seed = (self.seed << 8) + tag
        generate = respond if self.vllm is None else self.vllm.respond
        with torch.no_grad(), gathered(trainer, trainer.backend) as policy, trainer.accelerator.autocast():
            if self.vllm is not None:
                self.vllm.begin()
            for batch in batches:
                self.between()
                tokens = settings.response_length
                numbers = chances(seed, number, batch, tokens) if settings.temperature else None
                texts = generate(policy, [ids[place] for place in batch], numbers, tokens, settings.temperature,
                                      self.stops, self.tokenizer.pad_token_id, self.alive)  # fmt: skip
                found += zip(batch, texts, strict=True)
            if self.vllm is not None:
                self.vllm.end()
        self.seconds += time.perf_counter() - began
        return found

    def _parts(self, ids: list[Ids], answers: list[tuple[int, Ids]]) -> list[list[tuple[int, Ids]]]:
        """Answers in batches of the training's size and of like lengths. All ranks have as many of them."""
        size = self.trainer.args.per_device_train_batch_size
        order = sorted(answers, key=lambda one: -len(ids[one[0]]) - len(one[1]))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _look(self, ids: list[Ids], batch: list[tuple[int, Ids]]) -> list[Response]:
        """What the models say of a batch of responses."""
        self.between()
        answers = [answer for _, answer in batch]
        packed = self.trainer.model.way is not None
        inputs = batch_of([ids[place] for place, _ in batch], answers, self.tokenizer.pad_token_id, packed)
        device = self.trainer.args.device
        seen = self.trainer.model("look", batch={name: value.to(device) for name, value in inputs.items()})
        seen = {name: value.float().cpu() for name, value in seen.items()}
        return [
            Response(
                place=place,
                ids=answer,
                ended=bool(answer) and answer[-1] in self.stops,
                **{name: seen[name][row, : len(answer)].clone() for name in seen},
            )
            for row, (place, answer) in enumerate(batch)
        ]

    def _reward(
        self, found: list[Response], answered: list[list[tuple[int, Ids]]], prompts: Prompts, rows: Sequence[int],
        ids: list[Ids],
    ) -> None:  # fmt: skip
        """Give the responses their scores."""
        names = reward_names(self.settings)
        scores: list[list[float]] = []
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                given = [score for batch in answered for score in self._of_model(reward, batch, prompts, rows, ids)]
            else:
                given = _agreed(reward, self._texts([one for batch in answered for one in batch], prompts, rows, ids))
            scores.append(given)
        for one, score, parts in zip(found, weighted(scores, names), zip(*scores, strict=True), strict=True):
            one.score = score
            one.parts = {name.name: part for name, part in zip(names, parts, strict=True)}

    def _of_model(
        self, reward: ModelReward, batch: list[tuple[int, Ids]], prompts: Prompts, rows: Sequence[int], ids: list[Ids]
    ) -> list[float]:
        self.between()
        return reward(self._texts(batch, prompts, rows, ids), self.trainer.model, self.trainer.args.device)

    def _texts(
        self, batch: list[tuple[int, Ids]], prompts: Prompts, rows: Sequence[int], ids: list[Ids]
    ) -> Texts:  # fmt: skip
        own = [rows[place] for place, _ in batch]
        return Texts(
            turns=[prompts.turns(row) for row in own],
            completions=[self.tokenizer.decode(answer, skip_special_tokens=True) for _, answer in batch],
            prompt_ids=[ids[place] for place, _ in batch],
            completion_ids=[answer for _, answer in batch],
            wheres=[prompts.where(row) for row in own],
        )


def _agreed(reward: FunctionReward, texts: Texts) -> list[float]:
    """The rewards of a function; where it fails on one rank, all raise, before any waits for another elsewhere."""
    given: list[float] = []
    fault = ""
    try:
        given = reward(texts)
    except UserError as error:
        fault = str(error)
    if said := next(filter(None, gather_object([fault])), ""):
        raise UserError(said)
    return given
