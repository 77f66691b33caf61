"""What the trainers of all stages share: an order of rows, and counts, that depend on no number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch.utils.data import Sampler

from sft_dist.backend import Backend
from sft_dist.data.order import GlobalOrder, Row
from sft_dist.data.stream import StreamOrder
from sft_dist.metrics import Throughput, mfu, peak_memory_bytes
from sft_dist.sums import Sums
from sft_dist.trainers.guard import Event
from sft_dist.trainers.resumable import Resumable


class Ordered(Resumable):
    """To be mixed into a trainer of transformers, before it among the bases.

    `data_digest` tells the rows from others; `order_rows` has to be called before `train()`. `sums`: of what is logged
    as means, if there is more than the loss.
    """

    backend: Backend
    data_digest = ""
    sums: Sums | None = None

    def begin_counting(self, backend: Backend) -> None:
        """Before the base class is made."""
        self.backend = backend
        self.throughput = Throughput()
        self._flops: float | None = None
        self._order: Callable[[], GlobalOrder | StreamOrder] | None = None

    def order_rows(self, order: Callable[[], GlobalOrder | StreamOrder], digest: str, flops: float | None) -> None:
        """Settle the order of the rows. `flops`: of one token's forward and backward pass, None where unknown."""
        self._order, self.data_digest, self._flops = order, digest, flops

    @property
    def rows_per_step(self) -> int:
        """Rows of a global batch."""
        args = self.args
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Row]:
        assert self._order is not None, "order_rows() comes before train()"
        self._sampler = self._order()
        return self._sampler

    def set_data_epoch(self, epoch: int) -> None:
        """Tell the order of the rows which epoch it is."""
        self._sampler.set_epoch(epoch)

    def count_tokens(self, batches: list[Any]) -> tuple[int, int]:
        """Tokens that this rank sees in the micro-batches of a step, and those that are trained."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count what a step is trained on, over all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        counts = torch.tensor(self.count_tokens(batches), device=self.args.device)
        seen, learned = self.accelerator.reduce(counts, "sum").tolist()
        self.throughput.tokens += seen
        self.throughput.trained_tokens += learned
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, but refused before `train()` on several processes (see `BeforeTraining`)."""
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            raise RuntimeError("evaluate() before train() would leave the model without data parallelism")
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the step's loss alone does not tell."""
        if "loss" in logs:
            logs |= self.throughput.look()
            metrics = getattr(self, "_metrics", None)
            if metrics is not None:
                # TRL counts padding where it is given a mask of pairs, or none.
                metrics["train"]["num_tokens"] = [self.throughput.tokens]
            logs["num_trained_tokens"] = self.throughput.trained_tokens
            memory = torch.tensor(float(peak_memory_bytes()), device=self.args.device)
            logs["peak_memory_gb"] = round(self.accelerator.gather(memory.reshape(1)).max().item() / 1e9, 2)
            share = self._flops and mfu(logs["tokens_per_second"], self._flops, self.args.world_size)
            if share is not None:
                logs["mfu"] = share
        super().log(logs, start_time)

    def on_step_begins(self) -> None:
        """As the base class."""
        super().on_step_begins()
        if self.sums is not None:
            self.sums.begin_step()

    def _deal_with(self, event: Event) -> None:
        if self.sums is not None:
            self.sums.leave_out_step()
        super()._deal_with(event)

    def loop_state(self) -> dict[str, Any]:
        """As the base class; the counts of tokens, and the sums that are not logged yet."""
        held = {**super().loop_state(), "throughput": self.throughput.state()}
        return held if self.sums is None else {**held, self.sums.key: self.sums.state()}

    def load_loop_state(self, own: Mapping[str, Any], every: list[Mapping[str, Any]]) -> None:
        """As the base class."""
        super().load_loop_state(own, every)
        self.throughput.load_state(own["throughput"])
        if self.sums is not None:
            alike, key = own["same_ranks"], self.sums.key
            self.sums.load_state(
                [own[key]] if alike else [each[key] for each in every], alike or self.args.process_index == 0
            )

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks."""
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return total


def digest_of_rows(rows: Any, *settings: object) -> str:
    """What tells prepared rows, which have a column `digest`, and settings from others."""
    found = xxhash.xxh3_128(" ".join(map(str, [len(rows), *settings])).encode())
    for batch in rows.select_columns(["digest"]).with_format("arrow").iter(100_000):
        for chunk in batch["digest"].chunks:
            found.update(b"".join(chunk.to_pylist()))
    return found.hexdigest()
