"""Supervised fine-tuning: TRL's trainer on rows prepared by this project.

TRL's `SFTTrainer` is subclassed for four things only: the order of the rows, which must not depend on the number
of processes, how packed rows are fed, the held-out loss, which must be a mean over tokens and not over batches, and
checkpoints (see `Resumable`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl
import xxhash
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from transformers import EvalPrediction

from sft_dist.attention import Way, feed, text_config
from sft_dist.backend import Backend, Sizes, deepspeed_config
from sft_dist.config import Recipe
from sft_dist.data.arrangement import Arrangement, DocumentRows, document_lengths
from sft_dist.data.collate import Collator
from sft_dist.data.masking import IGNORE
from sft_dist.data.order import GlobalOrder, Row
from sft_dist.data.stream import Stream, StreamOrder, StreamRows
from sft_dist.errors import UserError
from sft_dist.evaluation.perplexity import measure, row_nll
from sft_dist.metrics import SourceLosses, Throughput, flops_per_token, mfu, peak_memory_bytes, perplexity
from sft_dist.rundir import RunDir
from sft_dist.trainers.resumable import Resumable

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
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        read = {name: int(os.environ.get(name, fallback)) for name, fallback in _WORLD.items()}
        size = read["WORLD_SIZE"]
        return cls(read["RANK"], size, read["LOCAL_RANK"], int(os.environ.get("LOCAL_WORLD_SIZE", size)))

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


def sft_config(
    recipe: Recipe, run: RunDir, world: World, bf16: bool, bar: bool, backend: Backend, hidden: int
) -> trl.SFTConfig:
    """The recipe's `train` section as TRL's configuration. `bar`: a progress bar instead of plain lines.

    `hidden`: width of the model, after which DeepSpeed's buckets are sized.
    """
    given = recipe.train.model_dump(exclude=_NOT_PASSED)
    # FSDP2 recomputes inside of its own hooks (sft_dist/fsdp2.py).
    if given["gradient_checkpointing"] and backend.kind == "fsdp2":
        given |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    if given["gradient_checkpointing"]:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | (
            given["gradient_checkpointing_kwargs"] or {}
        )
    given["lr_scheduler_kwargs"] = given["lr_scheduler_kwargs"] or {}
    accumulation = accumulation_steps(recipe, world.size)
    # `auto` may come to what the recipe's check did not see.
    if recipe.train.torch_compile and backend.kind != "plain":
        raise UserError(f"train.torch_compile: cannot stand with {backend.name} so far; leave it out")
    if backend.kind == "deepspeed":
        sizes = Sizes(accumulation, world.size, world.local_size, hidden)
        given["deepspeed"] = deepspeed_config(backend, recipe, sizes, bf16=bf16, cuda=torch.cuda.is_available())
    return trl.SFTConfig(
        output_dir=str(run.checkpoints),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=accumulation,
        # The trainer's own callbacks know nothing of an earlier start (sft_dist/trackers.py).
        report_to="none",
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


class SFTTrainer(Resumable, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of rows and a held-out loss that depend on no number of processes."""

    def __init__(self, model: PreTrainedModel, args: trl.SFTConfig, rows: Dataset, held_out: Dataset | None,
                 tokenizer: PreTrainedTokenizerBase, backend: Backend) -> None:  # fmt: skip
        self.backend = backend
        self.throughput = Throughput()
        self._rows = rows
        self.packing: dict[str, Any] | None = None
        self._order: Callable[[], GlobalOrder | StreamOrder] | None = None
        self._way: Way | None = None
        self.by_source: SourceLosses | None = None
        self._sources: torch.Tensor | None = None
        # What tells the rows from others; the position of a stream; the records of a step.
        self.data_digest = ""
        self.stream_position: Callable[[], dict[str, str]] | None = None
        self._samples: Callable[[int], list[str]] = lambda _: []
        # TRL would cast the adapter to bf16 over weights in 4 bits: its values, and their updates, would be rounded.
        if quantized := getattr(model, "is_loaded_in_4bit", False):
            model.is_loaded_in_4bit = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out and _by_length(held_out),
            processing_class=tokenizer,
            data_collator=Collator(tokenizer.pad_token_id),
            compute_metrics=_token_mean,
        )
        if quantized:
            del model.is_loaded_in_4bit

    def arrange(self, arrangement: Arrangement, way: Way | None, sources: Mapping[str, int] | None = None) -> None:
        """Settle what is trained on, before `train()`. `way`: how packed rows are fed, None for padded ones.

        `sources`: the first document of each source by its name, where losses are told apart by source.
        """
        self._order = lambda: GlobalOrder(arrangement, self.rows_per_step)
        self.data_digest = _digest(self._rows, arrangement.capacity)
        order = GlobalOrder(arrangement, self.rows_per_step)
        self._samples = lambda step: self._records(order.of_step(step))
        borders = tuple(sources.values()) if sources else (0,)
        self.train_dataset: TorchDataset[Any] = DocumentRows(
            self._rows, len(arrangement), self.processing_class.pad_token_id, borders
        )
        self._feed(way, float(arrangement.lengths.mean()), list(sources or ()))
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
        self.data_digest = xxhash.xxh3_128("\n".join(fingerprints).encode()).hexdigest()
        self._order = lambda: StreamOrder(stream, self.rows_per_step, start_row)
        self.train_dataset = StreamRows(stream, self.processing_class.pad_token_id, bool(sources))
        # The order begins where the checkpoint ended.
        self.args.ignore_data_skip = True
        self._feed(way, mean_length, sources)

    def _feed(self, way: Way | None, mean_length: float, sources: Sequence[str]) -> None:
        self._way = way
        self._flops = flops_per_token(self.model, self.model.config, mean_length)
        self.data_collator = Collator(self.processing_class.pad_token_id, way is not None, self._width())
        if sources:
            self.by_source = SourceLosses(sources, self.args.device)
            self.model.register_forward_hook(self._count_sources)

    def _width(self) -> int | None:
        """Tokens of every packed row where kernels are compiled, and would be anew for each width."""
        flex = text_config(self.model.config)._attn_implementation == "flex_attention" and torch.cuda.is_available()
        return self.args.max_length if flex or self.args.torch_compile else None

    @property
    def rows_per_step(self) -> int:
        """Rows of a global batch."""
        args = self.args
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Row]:
        assert self._order is not None, "arrange() comes before train()"
        self._sampler = self._order()
        return self._sampler

    def set_data_epoch(self, epoch: int) -> None:
        """Tell the order of the rows which epoch it is."""
        self._sampler.set_epoch(epoch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class; packed rows are fed in the way that was proven exact."""
        if self._way is not None and "document_ids" in inputs:
            inputs = feed(inputs, self._way, self.model.config, self.model.dtype)
        self._sources = inputs.pop("sources", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count_sources(self, _: Any, __: Any, outputs: Any) -> None:
        """A hook on the model: the base class keeps the losses of single tokens to itself."""
        if self.by_source is not None and self._sources is not None:
            self.by_source.add(outputs.log_probs, outputs.label_mask, self._sources[:, 1:])
            self._sources = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count what a step is trained on, over all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            tokens = batch["attention_mask"] if "attention_mask" in batch else batch["document_ids"] > 0
            trained = batch["labels"][:, 1:] != IGNORE
            # A row in which nothing is trained is filler.
            counts += torch.stack([(tokens * trained.any(1, keepdim=True)).sum(), trained.sum()]).cpu()
        seen, learned = self.accelerator.reduce(counts.to(self.args.device), "sum").tolist()
        self.throughput.tokens += seen
        self.throughput.trained_tokens += learned
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, but refused before `train()` on several processes (see `BeforeTraining`)."""
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            raise RuntimeError("evaluate() before train() would leave the model without data parallelism")
        return super().evaluate(*args, **kwargs)

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
            logs |= self.throughput.look()
            # The base class counts padding where it is given a mask of pairs, or none.
            self._metrics["train"]["num_tokens"] = [self.throughput.tokens]
            logs["num_trained_tokens"] = self.throughput.trained_tokens
            memory = torch.tensor(float(peak_memory_bytes()), device=self.args.device)
            logs["peak_memory_gb"] = round(self.accelerator.gather(memory.reshape(1)).max().item() / 1e9, 2)
            if self.by_source is not None:
                logs |= self.by_source.look(self._summed)
            share = mfu(logs["tokens_per_second"], self._flops, self.args.world_size)
            if share is not None:
                logs["mfu"] = share
        super().log(logs, start_time)

    def loop_state(self) -> dict[str, Any]:
        """As the base class; the counts of tokens, and the sums that are not logged yet."""
        held = {**super().loop_state(), "throughput": self.throughput.state()}
        return held if self.by_source is None else {**held, "sources": self.by_source.state()}

    def load_loop_state(self, own: Mapping[str, Any], every: list[Mapping[str, Any]]) -> None:
        """As the base class."""
        super().load_loop_state(own, every)
        self.throughput.load_state(own["throughput"])
        if self.by_source is not None:
            alike = own["same_ranks"]
            self.by_source.load_state([own["sources"]] if alike else [each["sources"] for each in every],
                                      self.args.process_index == 0 or alike)  # fmt: skip

    def documents(self) -> dict[str, str]:
        """The position of a stream."""
        return {} if self.stream_position is None else self.stream_position()

    def samples_of_step(self) -> list[str]:
        """The file and number of each record of the step."""
        return self._samples(self.state.global_step)

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return summed


def _digest(rows: Dataset, capacity: int | None) -> str:
    """What tells prepared rows, and whether they are packed, from others."""
    found = xxhash.xxh3_128(f"{len(rows)} {capacity}".encode())
    for batch in rows.select_columns(["digest"]).with_format("arrow").iter(100_000):
        for chunk in batch["digest"].chunks:
            found.update(b"".join(chunk.to_pylist()))
    return found.hexdigest()


def _token_mean(prediction: EvalPrediction) -> dict[str, float]:
    found = measure(torch.as_tensor(prediction.predictions))
    return {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens, "records": found.records}


def _by_length(rows: Dataset) -> Dataset:
    """Sums over rows do not depend on their order, and rows of like length need little padding."""
    return rows.select(np.argsort(-document_lengths(rows), kind="stable"))
