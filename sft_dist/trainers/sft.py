"""Supervised fine-tuning: TRL's trainer on rows prepared by this project.

TRL's `SFTTrainer` is subclassed for two things only: the order of the rows, which must not depend on the
number of processes, and the held-out loss, which must be a mean over tokens and not over batches.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch.utils.data import Sampler
from transformers import EvalPrediction

from sft_dist.config import Recipe
from sft_dist.data.collate import PaddingCollator
from sft_dist.data.masking import IGNORE
from sft_dist.data.order import GlobalOrder
from sft_dist.errors import UserError
from sft_dist.evaluation.perplexity import measure, row_nll
from sft_dist.metrics import Throughput, flops_per_token, mfu, peak_memory_bytes, perplexity
from sft_dist.models import lora_config
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Settings of the recipe's `train` section that SFTConfig does not take as they are.
_NOT_PASSED = {"bf16", "gradient_accumulation_steps", "run_name", "report_to"}


@dataclass(frozen=True)
class World:
    """How many processes there are and which one this is, from the standard torch.distributed environment."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        read = {name: int(os.environ.get(name, fallback)) for name, fallback in _WORLD.items()}
        return cls(read["RANK"], read["WORLD_SIZE"], read["LOCAL_RANK"])

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_WORLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Micro-batches per optimizer step. Raises :class:`UserError` when the global batch does not divide."""
    rows = recipe.parallel.global_batch_size
    if rows is None:
        return recipe.train.gradient_accumulation_steps
    at_once = recipe.train.per_device_train_batch_size * processes
    if rows % at_once:
        raise UserError(
            f"parallel.global_batch_size: {rows} rows do not divide over {processes} processes of "
            f"{recipe.train.per_device_train_batch_size} rows; make it a multiple of {at_once}"
        )
    return rows // at_once


def sft_config(recipe: Recipe, run: RunDir, world: World, bf16: bool, bar: bool) -> trl.SFTConfig:
    """The recipe's `train` section as TRL's configuration. `bar`: a progress bar instead of plain lines."""
    given = recipe.train.model_dump(exclude=_NOT_PASSED)
    if given["gradient_checkpointing"]:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | (
            given["gradient_checkpointing_kwargs"] or {}
        )
    given["lr_scheduler_kwargs"] = given["lr_scheduler_kwargs"] or {}
    return trl.SFTConfig(
        output_dir=str(run.checkpoints),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=accumulation_steps(recipe, world.size),
        report_to=recipe.train.report_to or "none",
        run_name=recipe.train.run_name or run.root.name,
        disable_tqdm=not bar,
        dataset_kwargs={"skip_prepare_dataset": True},
        # The collator takes what it needs; the trainer would drop the columns it does not know.
        remove_unused_columns=False,
        # Every parameter is used in every step; looking for others walks the graph once more.
        ddp_find_unused_parameters=False,
        eval_do_concat_batches=True,
        **given,
    )


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of rows and a held-out loss that depend on no number of processes."""

    def __init__(self, model: PreTrainedModel, args: trl.SFTConfig, rows: Dataset, held_out: Dataset | None,
                 tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:  # fmt: skip
        self.throughput = Throughput()
        self._lengths = _lengths(rows)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_with_filler(rows, tokenizer.pad_token_id),
            eval_dataset=held_out and _by_length(held_out),
            processing_class=tokenizer,
            data_collator=PaddingCollator(tokenizer.pad_token_id),
            compute_metrics=_token_mean,
            peft_config=lora_config(recipe.peft),
        )
        self._flops = flops_per_token(self.model, self.model.config, sum(self._lengths) / len(rows))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return GlobalOrder(self._lengths, rows_per_step, seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count what a step is trained on, over all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            counts += torch.stack([batch["attention_mask"].sum(), (batch["labels"][:, 1:] != IGNORE).sum()]).cpu()
        tokens, trained = self.accelerator.reduce(counts.to(self.args.device), "sum").tolist()
        self.throughput.tokens += tokens
        self.throughput.trained_tokens += trained
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, but refused before `train()` on several processes (see `BeforeTraining`)."""
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            raise RuntimeError("evaluate() before train() would leave the model without data parallelism")
        return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Sums per row instead of a mean per batch, so that every token weighs the same."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            stats = row_nll(model, inputs)
        return None, stats, stats[:, 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the step's loss alone does not tell."""
        if "loss" in logs:
            logs["perplexity"] = perplexity(logs["loss"])
            logs |= self.throughput.look()
            logs["num_trained_tokens"] = self.throughput.trained_tokens
            memory = torch.tensor(float(peak_memory_bytes()), device=self.args.device)
            logs["peak_memory_gb"] = round(self.accelerator.gather(memory.reshape(1)).max().item() / 1e9, 2)
            share = mfu(logs["tokens_per_second"], self._flops, self.args.world_size)
            if share is not None:
                logs["mfu"] = share
        super().log(logs, start_time)


def _token_mean(prediction: EvalPrediction) -> dict[str, float]:
    found = measure(torch.as_tensor(prediction.predictions))
    return {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens, "records": found.records}


def _lengths(rows: Dataset) -> list[int]:
    """Tokens of each row, read column by column: whole rows would be decoded for nothing."""
    import pyarrow.compute as pc

    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_pylist()
    return lengths


def _by_length(rows: Dataset) -> Dataset:
    """Sums over rows do not depend on their order, and rows of like length need little padding."""
    lengths = _lengths(rows)
    return rows.select(sorted(range(len(rows)), key=lambda row: -lengths[row]))


def _with_filler(rows: Dataset, token: int) -> Dataset:
    """The rows and, behind them, the one row in which nothing is trained (see `GlobalOrder`)."""
    from datasets import Dataset, concatenate_datasets

    filler = {"input_ids": [[token]], "labels": [[IGNORE]], "where": ["filler"], "turns": ["[]"], "digest": [b""],
              "length": [1], "trained": [0]}  # fmt: skip
    return concatenate_datasets([rows, Dataset.from_dict(filler, features=rows.features)])
