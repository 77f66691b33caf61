"""Supervised fine-tuning (`stage: sft`): conversations or plain text, the loss on the responses."""

from __future__ import annotations

from contextlib import ExitStack

from sft_dist.checkpoints.keeper import Held
from sft_dist.data.account import Account
from sft_dist.data.prepare import summed
from sft_dist.data.stream import Stream
from sft_dist.data.template import stop_token_ids
from sft_dist.evaluation.examination import Examination, Result, report
from sft_dist.loading import load_trained_model
from sft_dist.saving import save_model
from sft_dist.stages import Setting
from sft_dist.trainers.sft import SFTTrainer, sft_config
from sft_dist.training_data import arrange, arrange_stream, data_lines, prepared_rows


class SFTStage:
    """See :class:`sft_dist.stages.Stage`."""

    trainer: SFTTrainer
    examination: Examination

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._stream: Stream | None = None

    def prepare_data(self) -> list[str]:
        """The training rows and the held-out rows."""
        setting = self.setting
        self.train, self.held_out = prepared_rows(setting.recipe, setting.template, setting.limit)
        return data_lines(self.train, self.held_out)

    def make_trainer(self) -> None:
        """TRL's trainer around the model."""
        s = self.setting
        hidden = s.config.get_text_config().hidden_size
        # Before the model: they set up the process group, and DeepSpeed for the loading.
        args = sft_config(s.recipe, s.run, s.world, s.bf16, s.bar, s.backend, hidden)
        model = load_trained_model(s.path, s.recipe, s.tokenizer, s.backend, s.world, s.bf16, s.say)
        rows = self.held_out.rows if self.held_out is not None else None
        self.trainer = SFTTrainer(model, args, self.train.rows, rows, s.tokenizer, s.backend)

    def arrange(self, held: Held | None, ending: ExitStack) -> None:
        """Rows that are packed or not, of data that lie prepared or come as a stream."""
        s, trainer = self.setting, self.trainer
        if s.recipe.data.streaming:
            checkpoint = held.path if held else None
            self._stream = arrange_stream(trainer, s.recipe, s.limit, s.world, checkpoint, ending, s.say)
        else:
            arrange(trainer, s.recipe, self.train, s.limit, s.say)
        trainer.model.generation_config.eos_token_id = stop_token_ids(s.template)
        self.examination = Examination(trainer, s.recipe, s.template, self.held_out, s.limit, s.say)

    def measure(self, when: str) -> Result | None:
        """Held-out loss and the answers to held-out prompts."""
        return self.examination.take(when)

    def save(self) -> None:
        """The model, or its adapter."""
        save_model(self.trainer.model, self.setting)

    def report(self, after: Result | None, seconds: float) -> None:
        """Summary, answers and the page that compares them."""
        s = self.setting
        report(s.recipe, s.run, self.examination, self._account(), after, seconds)

    def _account(self) -> Account:
        return self.train.account if self._stream is None else summed(self._stream.accounts())
