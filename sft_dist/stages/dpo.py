"""Direct preference optimisation (`stage: dpo`): preference pairs, and a reference that the policy is held to."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from sft_dist.checkpoints.keeper import Held
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.pairs import prepare_pairs
from sft_dist.data.prepare import data_seed
from sft_dist.data.template import stop_token_ids
from sft_dist.dpo.examination import PairExamination
from sft_dist.dpo.precomputed import tables
from sft_dist.dpo.reference import Reference, adapter_off, load_reference
from sft_dist.evaluation.examination import Result, report
from sft_dist.loading import load_trained_model
from sft_dist.saving import save_model
from sft_dist.stages import Setting
from sft_dist.trainers.dpo import DPOTrainer, dpo_config
from sft_dist.training_data import data_lines, mixture_line

if TYPE_CHECKING:
    import trl

_SORTING = {"aot", "aot_unpaired"}


class DPOStage:
    """See :class:`sft_dist.stages.Stage`."""

    trainer: DPOTrainer
    examination: PairExamination

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def prepare_data(self) -> list[str]:
        """The pairs that are trained on and those held out."""
        s = self.setting
        self.train, self.held_out = prepare_pairs(s.recipe, s.template, s.limit)
        return data_lines(self.train, self.held_out)

    def make_trainer(self) -> None:
        """TRL's trainer around the model; the reference comes first where it is only asked beforehand."""
        s, settings = self.setting, self.setting.recipe.dpo
        # Before the models: they set up the process group, and DeepSpeed for the loading.
        args = dpo_config(s)
        held_out = self.held_out.rows if self.held_out is not None else None
        splits = [self.train.rows] + ([held_out] if held_out is not None else [])
        known = tuple(tables(s, args, splits)) if settings.precompute_ref_log_probs else ()
        reference = None if s.recipe.peft.use_peft or known else self._reference(args)
        # Rows of an embedding that grows are drawn; those of the reference are the same.
        torch.manual_seed(s.recipe.train.seed)
        model = load_trained_model(s.path, s.recipe, s.tokenizer, s.backend, s.world, s.bf16, s.say)
        if s.recipe.peft.use_peft:
            reference = adapter_off(model, s, args.device)
        self.trainer = DPOTrainer(
            model, args, self.train.rows, held_out, s.tokenizer, s.backend, settings, reference, known
        )
        self._say_what_depends(args)

    def _reference(self, args: trl.DPOConfig) -> Reference:
        torch.manual_seed(self.setting.recipe.train.seed)
        return load_reference(self.setting, args)

    def _say_what_depends(self, args: trl.DPOConfig) -> None:
        if sorting := _SORTING & set(self.setting.recipe.dpo.loss_type):
            self.setting.say(
                f"dpo.loss_type: {', '.join(sorted(sorting))} compares the pairs of a micro-batch with each other, so "
                f"that the loss depends on its {args.per_device_train_batch_size} pairs and on the number of processes"
            )

    def arrange(self, held: Held | None, ending: ExitStack) -> None:
        """Pairs in their order, each a row."""
        s, trainer = self.setting, self.trainer
        arrangement = Arrangement(document_lengths(self.train.rows), None, data_seed(s.recipe), self.train.mixture)
        if self.train.mixture is not None:
            s.say(mixture_line(self.train, self.train.mixture))
        trainer.arrange(arrangement)
        trainer.model.generation_config.eos_token_id = stop_token_ids(s.template)
        self.examination = PairExamination(trainer, s.recipe, s.template, self.held_out, s.limit, s.say)

    def measure(self, when: str) -> Result | None:
        """Held-out pairs and the answers to their prompts."""
        return self.examination.take(when)

    def save(self) -> None:
        """The policy, or its adapter."""
        save_model(self.trainer.model, self.setting)

    def report(self, after: Result | None, seconds: float) -> None:
        """Summary, answers and the page that compares them."""
        s = self.setting
        report(s.recipe, s.run, self.examination, self.train.account, after, seconds)
