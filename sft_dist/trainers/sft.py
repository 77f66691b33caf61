"""Supervised fine-tuning: TRL's trainer on rows prepared by this project.

TRL's `SFTTrainer` is subclassed for four things only: the order of the rows, which must not depend on the number
of processes, how packed rows are fed, the held-out loss, which must be a mean over tokens and not over batches, and
checkpoints (see `Resumable`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl
import xxhash
from torch.utils.data import Dataset as TorchDataset
from transformers import EvalPrediction

from sft_dist.adapters import left_in_fp32
from sft_dist.attention import Way, feed, text_config
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.data.arrangement import Arrangement, DocumentRows, document_lengths
from sft_dist.data.collate import Collator
from sft_dist.data.masking import IGNORE
from sft_dist.data.order import GlobalOrder, Row
from sft_dist.data.stream import Stream, StreamOrder, StreamRows
from sft_dist.evaluation.perplexity import measure, row_nll
from sft_dist.metrics import SourceLosses, flops_per_token, perplexity
from sft_dist.rundir import RunDir
from sft_dist.trainers.arguments import training_arguments
from sft_dist.trainers.ordered import Ordered, digest_of_rows
from sft_dist.world import World

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sft_config(
    recipe: Recipe, run: RunDir, world: World, bf16: bool, bar: bool, backend: Backend, hidden: int
) -> trl.SFTConfig:
    """The recipe's `train` section as TRL's configuration (see `training_arguments`)."""
    prepared = {"skip_prepare_dataset": True}
    return training_arguments(trl.SFTConfig, recipe, run, world, bf16, bar, backend, hidden, dataset_kwargs=prepared)


class SFTTrainer(Ordered, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of rows and a held-out loss that depend on no number of processes."""

    # Where losses are told apart by source.
    sums: SourceLosses | None = None

    def __init__(self, model: PreTrainedModel, args: trl.SFTConfig, rows: Dataset, held_out: Dataset | None,
                 tokenizer: PreTrainedTokenizerBase, backend: Backend) -> None:  # fmt: skip
        self.begin_counting(backend)
        self._rows = rows
        self.packing: dict[str, Any] | None = None
        self._way: Way | None = None
        self._sources: torch.Tensor | None = None
        # The position of a stream; the records of a step.
        self.stream_position: Callable[[], dict[str, str]] | None = None
        self._samples: Callable[[int], list[str]] = lambda _: []
        with left_in_fp32(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=held_out and _by_length(held_out),
                processing_class=tokenizer,
                data_collator=Collator(tokenizer.pad_token_id),
                compute_metrics=_token_mean,
            )

    def arrange(self, arrangement: Arrangement, way: Way | None, sources: Mapping[str, int] | None = None) -> None:
        """Settle what is trained on, before `train()`. `way`: how packed rows are fed, None for padded ones.

        `sources`: the first document of each source by its name, where losses are told apart by source.
        """
        flops = self._flops_of_rows(float(arrangement.lengths.mean()))
        digest = digest_of_rows(self._rows, arrangement.capacity)
        self.order_rows(lambda: GlobalOrder(arrangement, self.rows_per_step), digest, flops)
        order = GlobalOrder(arrangement, self.rows_per_step)
        self._samples = lambda step: self._records(order.of_step(step))
        borders = tuple(sources.values()) if sources else (0,)
        self.train_dataset: TorchDataset[Any] = DocumentRows(
            self._rows, len(arrangement), self.processing_class.pad_token_id, borders
        )
        self._feed(way, list(sources or ()))
        if way is not None:
            self.packing = {"way": way.value, "capacity": arrangement.capacity, "rows": len(arrangement),
                            "fill": arrangement.fill()}  # fmt: skip

    def _records(self, rows: Iterable[Row]) -> list[str]:
        documents = [document for row in rows for document in row]
        return [str(self._rows[document]["where"]) for document in documents]

    def arrange_stream(
        self, stream: Stream, way: Way | None, start_row: int, mean_length: float, sources: Sequence[str],
        fingerprints: Sequence[str],
    ) -> None:  # fmt: skip
        """As `arrange`, for a stream of which the rows from `start_row` on are trained on.

        `mean_length`: tokens of a document. `sources`: their names, where losses are told apart by source.
        `fingerprints`: of the data of each source.
        """
        digest = xxhash.xxh3_128("\n".join(fingerprints).encode()).hexdigest()
        flops = self._flops_of_rows(mean_length)
        self.order_rows(lambda: StreamOrder(stream, self.rows_per_step, start_row), digest, flops)
        self.train_dataset = StreamRows(stream, self.processing_class.pad_token_id, bool(sources))
        # The order begins where the checkpoint ended.
        self.args.ignore_data_skip = True
        self._feed(way, sources)

    def _flops_of_rows(self, mean_length: float) -> float:
        return flops_per_token(self.model, self.model.config, mean_length)

    def _feed(self, way: Way | None, sources: Sequence[str]) -> None:
        self._way = way
        self.data_collator = Collator(self.processing_class.pad_token_id, way is not None, self._width())
        if sources:
            self.sums = SourceLosses(sources, self.args.device)
            self.model.register_forward_hook(self._count_sources)

    def _width(self) -> int | None:
        """Tokens of every packed row where kernels are compiled, and would be anew for each width."""
        flex = text_config(self.model.config)._attn_implementation == "flex_attention" and torch.cuda.is_available()
        return self.args.max_length if flex or self.args.torch_compile else None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class; packed rows are fed in the way that was proven exact."""
        if self._way is not None and "document_ids" in inputs:
            inputs = feed(inputs, self._way, self.model.config, self.model.dtype)
        self._sources = inputs.pop("sources", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count_sources(self, _: Any, __: Any, outputs: Any) -> None:
        """A hook on the model: the base class keeps the losses of single tokens to itself."""
        if self.sums is not None and self._sources is not None:
            self.sums.add(outputs.log_probs, outputs.label_mask, self._sources[:, 1:])
            self._sources = None

    def count_tokens(self, batches: list[Any]) -> tuple[int, int]:
        """As the base class."""
        seen = learned = 0
        for batch in batches:
            tokens = batch["attention_mask"] if "attention_mask" in batch else batch["document_ids"] > 0
            trained = batch["labels"][:, 1:] != IGNORE
            # A row in which nothing is trained is filler.
            seen += int((tokens * trained.any(1, keepdim=True)).sum())
            learned += int(trained.sum())
        return seen, learned

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Sums per row instead of a mean per batch, so that every token weighs the same."""
        self.leave_evaluation_if_asked()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            stats = row_nll(model, inputs)
        return None, stats, stats[:, 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the step's loss alone does not tell."""
        if "loss" in logs:
            logs["perplexity"] = perplexity(logs["loss"])
            if self.sums is not None:
                logs |= self.sums.look(self.summed)
        super().log(logs, start_time)

    def documents(self) -> dict[str, str]:
        """The position of a stream."""
        return {} if self.stream_position is None else self.stream_position()

    def samples_of_step(self) -> list[str]:
        """The file and number of each record of the step."""
        return self._samples(self.state.global_step)


def _token_mean(prediction: EvalPrediction) -> dict[str, float]:
    found = measure(torch.as_tensor(prediction.predictions))
    return {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens, "records": found.records}


def _by_length(rows: Dataset) -> Dataset:
    """Sums over rows do not depend on their order, and rows of like length need little padding."""
    return rows.select(np.argsort(-document_lengths(rows), kind="stable"))
