"""Reward models (`stage: reward`): pairs of answers, of which the chosen one is to get the higher reward."""

from __future__ import annotations

from contextlib import ExitStack

import trl

from sft_dist.checkpoints.keeper import Held
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.pairs import prepare_pairs
from sft_dist.data.prepare import data_seed
from sft_dist.data.template import stop_token_ids
from sft_dist.evaluation.rewards import Result, measured, report
from sft_dist.loading import load_trained_model
from sft_dist.reward_model import settle_pad_token
from sft_dist.saving import save_model
from sft_dist.stages import Setting
from sft_dist.trainers.arguments import training_arguments
from sft_dist.trainers.reward import RewardTrainer
from sft_dist.training_data import data_lines, mixture_line


class RewardStage:
    """See :class:`sft_dist.stages.Stage`."""

    trainer: RewardTrainer

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        settle_pad_token(setting.tokenizer, stop_token_ids(setting.template), setting.say)

    def prepare_data(self) -> list[str]:
        """The pairs that are trained on and those held out."""
        setting = self.setting
        self.train, self.held_out = prepare_pairs(setting.recipe, setting.template, setting.limit)
        return data_lines(self.train, self.held_out)

    def make_trainer(self) -> None:
        """TRL's trainer around the model with its head."""
        s = self.setting
        hidden = s.config.get_text_config().hidden_size
        # Before the model: they set up the process group, and DeepSpeed for the loading.
        args = training_arguments(trl.RewardConfig, s.recipe, s.run, s.world, s.bf16, s.bar, s.backend, hidden,
                                  **s.recipe.reward.model_dump())  # fmt: skip
        model = load_trained_model(s.path, s.recipe, s.tokenizer, s.backend, s.world, s.bf16, s.say, head="reward")
        rows = self.held_out.rows if self.held_out is not None else None
        self.trainer = RewardTrainer(model, args, self.train.rows, rows, s.tokenizer, s.backend)

    def arrange(self, held: Held | None, ending: ExitStack) -> None:
        """A pair a row, in the order of the seed or of the mixture."""
        s, mixture = self.setting, self.train.mixture
        if mixture is not None:
            s.say(mixture_line(self.train, mixture))
        arrangement = Arrangement(document_lengths(self.train.rows), None, data_seed(s.recipe), mixture)
        self.trainer.arrange(arrangement, stop_token_ids(s.template)[-1])

    def measure(self, when: str) -> Result | None:
        """Loss, accuracy and margin of held-out pairs, and the rewards of each."""
        return measured(self.trainer, self.held_out, when, self.setting.say)

    def save(self) -> None:
        """The model with its head, or adapter and head."""
        save_model(self.trainer.model, self.setting)

    def report(self, after: Result | None, seconds: float) -> None:
        """Summary, rewards and the page that shows the margins."""
        s = self.setting
        report(s.recipe, s.run, self.trainer, self.train.account, self.held_out, after, seconds)
