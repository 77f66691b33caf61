"""Direct preference optimisation: TRL's trainer on pairs prepared by this project.

TRL's `DPOTrainer` is subclassed for what it does per micro-batch: its loss is a mean over the pairs of one, and so are
the numbers that it logs, which therefore depend on the number of processes and on the filler of an incomplete global
batch. Here all of them are sums over the real pairs, divided by those of the global batch. The reference, which TRL
would load and place by itself, is given (see :mod:`sft_dist.dpo.reference`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl
from transformers import EvalPrediction

from sft_dist.adapters import left_in_fp32
from sft_dist.backend import Backend
from sft_dist.config_stages import DPOSection
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.order import GlobalOrder
from sft_dist.dpo.batch import Batch, PairCollator, PairRows, known_log_probs
from sft_dist.dpo.losses import OF_TOKENS
from sft_dist.dpo.measures import PairSums, held_out_means, held_out_row
from sft_dist.dpo.precomputed import Table
from sft_dist.dpo.reference import Reference
from sft_dist.dpo.scoring import Scored, confidences, divergence, inputs_of, weighted_losses, weights_of
from sft_dist.metrics import flops_per_token
from sft_dist.models import switch_dropout_off
from sft_dist.trainers.ordered import Ordered, digest_of_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft_dist.stages import Setting

# Settings of the section that are not TRL's, or that TRL would act upon by itself.
_NOT_PASSED = {"ref_model", "ref_model_revision", "precompute_ref_log_probs", "precompute_ref_batch_size"}


def dpo_config(setting: Setting) -> trl.DPOConfig:
    """The recipe's `train` and `dpo` sections as TRL's configuration (see `training_arguments`)."""
    from sft_dist.trainers.arguments import training_arguments

    s = setting
    hidden = s.config.get_text_config().hidden_size
    own = s.recipe.dpo.model_dump(exclude=_NOT_PASSED)
    return training_arguments(trl.DPOConfig, s.recipe, s.run, s.world, s.bf16, s.bar, s.backend, hidden, **own)


class DPOTrainer(Ordered, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's trainer with losses and measures that depend on no number of processes and on no filler."""

    # By the pairs of the global batch, in `_compute_loss`.
    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel, args: trl.DPOConfig, rows: Dataset, held_out: Dataset | None,
                 tokenizer: PreTrainedTokenizerBase, backend: Backend, settings: DPOSection,
                 reference: Reference | None, tables: tuple[Table, ...] = ()) -> None:  # fmt: skip
        """`tables`: the reference's log-probabilities of the rows, and of those held out, computed beforehand.

        `reference`: what is asked for them where there are no tables, and for its logits if it is there.
        """
        self.begin_counting(backend)
        self.settings, self._rows, self._tables, self.reference = settings, rows, tables, reference
        self._in_step = (1.0, 1.0)
        token = tokenizer.pad_token_id
        if held_out is not None:
            order = np.argsort(-document_lengths(held_out), kind="stable")
            self.held_out_rows = _Reordered(PairRows(held_out, len(held_out), token, *tables[1:]), order)
        if settings.disable_dropout:
            switch_dropout_off(model)
        with left_in_fp32(model):
            super().__init__(
                model=model,
                # Any but None: TRL would load another one, or copy the adapter.
                ref_model=_GIVEN,
                args=args,
                train_dataset=rows,
                eval_dataset=None if held_out is None else self.held_out_rows,
                processing_class=tokenizer,
                data_collator=PairCollator(token, bool(tables)),
                compute_metrics=self._means,
            )
        self.sums: PairSums = PairSums(self.args.device)

    @property
    def ref_model(self) -> None:
        """None: TRL has no reference of its own to place."""
        return

    @ref_model.setter
    def ref_model(self, _: Any) -> None:
        pass

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _means(self, prediction: EvalPrediction) -> dict[str, Any]:
        return held_out_means(torch.as_tensor(prediction.predictions), self.settings)

    def arrange(self, arrangement: Arrangement) -> None:
        """Settle what is trained on, before `train()`."""
        # Two sides of a pair, of which the longer one is known.
        flops = flops_per_token(self.model, self.model.config, float(arrangement.lengths.mean()))
        digest = digest_of_rows(self._rows, "dpo")
        self.order_rows(lambda: GlobalOrder(arrangement, self.rows_per_step), digest, flops)
        self._order_of_steps = GlobalOrder(arrangement, self.rows_per_step)
        self.train_dataset = PairRows(
            self._rows, len(arrangement), self.processing_class.pad_token_id, *self._tables[:1]
        )

    def samples_of_step(self) -> list[str]:
        """The file and number of each pair of the step."""
        rows = self._order_of_steps.of_step(self.state.global_step)
        return [str(self._rows[document]["where"]) for (document,) in rows]

    def count_tokens(self, batches: list[Any]) -> tuple[int, int]:
        """As the base class: of both sides, and their completions; filler aside."""
        seen = learned = 0
        for batch in batches:
            real = batch["is_pair"].repeat(2)
            seen += int(batch["attention_mask"][real].sum())
            learned += int(batch["completion_mask"][:, 1:].sum())
        return seen, learned

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As the base class; what the losses of the step are means over is settled."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        pairs = sum(int(batch["is_pair"].sum()) for batch in batches)
        tokens = sum(int(batch["completion_mask"][: len(batch["is_pair"]), 1:].sum()) for batch in batches)
        counts = self.summed(torch.tensor([pairs, tokens], device=self.args.device)).tolist()
        self._in_step = (float(max(counts[0], 1)), float(max(counts[1], 1)))
        return batches, items

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> torch.Tensor:
        """This micro-batch's part in the global batch's loss, times the ranks: gradients are averaged over them."""
        assert not return_outputs
        settings = self.settings
        # First, so that nothing comes between the policy's passes forward and back.
        reference = self._reference_log_probs(inputs)
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = model(**inputs_of(inputs), use_cache=False, fused_lm_head=True, **more)
        scored = Scored.of(inputs, out.log_probs.float(), reference, settings)
        pairs, tokens = self._in_step
        real = inputs["is_pair"].repeat(2)
        loss = weighted_losses(scored, settings, self._confidences(scored, out, real)).sum() / pairs
        loss = loss + weights_of(settings).get(OF_TOKENS, 0.0) * scored.chosen_nll().sum() / tokens
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out.aux_loss * len(scored) / pairs
        of_tokens = {name: getattr(out, name)[real] for name in ("entropy", "mean_logits", "is_top1")}
        self.sums.add(scored, settings.beta, of_tokens)
        whole: torch.Tensor = (loss * self.args.world_size).float()
        return whole

    def _confidences(self, scored: Scored, out: Any, real: torch.Tensor | slice = slice(None)) -> torch.Tensor | None:
        return confidences(scored, out.log_sum_sq_probs[real].detach()) if self.settings.use_weighting else None

    def _reference_log_probs(self, inputs: Batch) -> torch.Tensor:
        if (known := known_log_probs(inputs)) is not None:
            return known
        assert self.reference is not None, "neither a reference nor tables"
        return self.reference.log_probs(inputs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """What is measured of each pair instead of a mean per batch, so that every pair weighs the same."""
        self.leave_evaluation_if_asked()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            reference = self._reference_log_probs(inputs)
            out = model(**inputs_of(inputs), use_cache=False, fused_lm_head=True)
            scored = Scored.of(inputs, out.log_probs.float(), reference, self.settings)
            losses = weighted_losses(scored, self.settings, self._confidences(scored, out))
            rows = held_out_row(scored, losses, self.settings, self._divergence(model, inputs))
        return None, rows, rows[:, 0]

    def _divergence(self, model: Any, inputs: Batch) -> torch.Tensor | None:
        """The KL divergence from the reference summed over each chosen completion, or None without a reference."""
        if self.reference is None:
            return None
        chosen = len(inputs["is_pair"])
        side = {name: inputs[name][:chosen] for name in ("input_ids", "attention_mask")}
        theirs = self.reference.logits(side)
        ours = model(**side, use_cache=False).logits
        return divergence(ours, theirs, inputs["completion_mask"][:chosen])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the step's loss alone does not tell."""
        if "loss" in logs:
            logs |= self.sums.look(self.summed)
        super().log(logs, start_time)


# In the place of a reference that TRL would place by itself.
_GIVEN: Any = object()


class _Reordered(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in another order: measures over pairs do not depend on it, and rows of like length need little padding."""

    def __init__(self, rows: PairRows, order: np.ndarray[Any, Any]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[(int(self.order[number]),)]
