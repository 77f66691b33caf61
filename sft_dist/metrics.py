"""What a run reports while it trains: throughput, memory, MFU, and the lines that show them."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from sft_dist.hardware import peak_flops
from sft_dist.sums import Sums

_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_bytes() -> int:
    """The most memory this process has held: on its GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT


def count_weights(model: torch.nn.Module) -> tuple[int, int]:
    """Weights that are trained and weights that are frozen; whole ones, where ZeRO-3 holds shards of them."""
    trained = frozen = 0
    for parameter in model.parameters():
        size = whole_size(parameter)
        trained, frozen = (trained + size, frozen) if parameter.requires_grad else (trained, frozen + size)
    return trained, frozen


def whole_size(parameter: torch.Tensor) -> int:
    """Elements of a parameter before DeepSpeed has cut it into shards."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def flops_per_token(model: torch.nn.Module, config: Any, row_length: float, has_lm_head: bool = True) -> float:
    """Model FLOPs of one token's forward and backward pass, without recomputation.

    6 N + 12 L H T of PaLM (Chowdhery et al. 2022, appendix B), where N counts the weights that are
    multiplied (no input embedding unless it is tied to the head), L layers, H hidden size, T row length.
    Frozen weights need no weight gradient, which leaves 4 of the 6. Without a language model's head the input
    embedding is not multiplied, tied or not.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    trained, frozen = count_weights(model)
    if not (has_lm_head and getattr(config, "tie_word_embeddings", False)):
        count = whole_size(embedding)
        trained, frozen = (trained - count, frozen) if embedding.requires_grad else (trained, frozen - count)
    attention = 12.0 * float(config.num_hidden_layers) * float(config.hidden_size) * row_length
    return 6.0 * trained + 4.0 * frozen + attention


class Throughput:
    """Tokens over time since the last look, and over the whole training. All counts are over all ranks."""

    def __init__(self) -> None:
        self.tokens = self.trained_tokens = 0
        self.seconds = 0.0
        self._last = (0, 0)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Time before the first step (loading, evaluation) does not count."""
        self._since = time.perf_counter()

    def look(self) -> dict[str, float]:
        """tokens/s and trained tokens/s since the last look."""
        now = time.perf_counter()
        took, self._since = now - self._since, now
        self.seconds += took
        new = (self.tokens - self._last[0], self.trained_tokens - self._last[1])
        self._last = (self.tokens, self.trained_tokens)
        return {"tokens_per_second": new[0] / took, "trained_tokens_per_second": new[1] / took}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"tokens": self.tokens, "trained_tokens": self.trained_tokens, "seconds": self.seconds}

    def load_state(self, held: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.tokens, self.trained_tokens, self.seconds = held["tokens"], held["trained_tokens"], held["seconds"]
        self._last = (self.tokens, self.trained_tokens)
        self.start()

    def overall(self) -> dict[str, float]:
        """The same over all looks so far."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tokens_per_second": self.tokens / seconds,
            "trained_tokens_per_second": self.trained_tokens / seconds,
        }


class SourceLosses(Sums):
    """Loss and trained tokens of each source of a mixture, since the last look and over the whole training."""

    key = "sources"

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        super().__init__((2, len(names)), device)
        self.names = tuple(names)
        self.trained_tokens = dict.fromkeys(self.names, 0)

    def add(self, log_probs: torch.Tensor, trained: torch.Tensor, sources: torch.Tensor) -> None:
        """Count a micro-batch: log-probabilities, whether they are trained, and the source, each (rows, length)."""
        for number in range(len(self.names)):
            mine = trained & (sources == number)
            self.values[0, number] -= log_probs.detach()[mine].sum(dtype=torch.float64)
            self.values[1, number] += mine.sum()

    def look(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`loss/NAME` per trained token since the last look and `tokens/NAME`, trained tokens since the beginning.

        `over_ranks`: see `take`.
        """
        found: dict[str, float] = {}
        for name, loss, tokens in zip(self.names, *self.take(over_ranks), strict=True):
            self.trained_tokens[name] += int(tokens)
            if tokens:
                found[f"loss/{name}"] = loss / tokens
            found[f"tokens/{name}"] = self.trained_tokens[name]
        return found

    def state(self) -> dict[str, Any]:
        """As the base class."""
        return {"trained_tokens": dict(self.trained_tokens), "sums": super().state()}

    def load_state(self, every: Sequence[Mapping[str, Any]], takes_sums: bool) -> None:
        """As the base class."""
        self.trained_tokens = dict(every[0]["trained_tokens"])
        super().load_state([each["sums"] for each in every], takes_sums)


def mfu(tokens_per_second: float, flops: float, devices: int) -> float | None:
    """Share of the devices' dense bf16 peak that the model's own arithmetic uses, or None if unknown."""
    if not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else tokens_per_second * flops / (devices * peak)


def line(logs: dict[str, Any], step: int, steps: int) -> str | None:
    """One line of a training log for people, or None for records that are no step's."""
    head = f"step {step:>{len(str(steps))}}/{steps}"
    if "loss" in logs:
        parts = [head, f"loss {logs['loss']:.4f}"]
        for key, name, form in _SHOWN:
            if key in logs:
                parts.append(f"{name} {logs[key]:{form}}")
        return "  ".join(parts)
    if "eval_reward" in logs:
        told = f"{head}  held-out reward {logs['eval_reward']:.4f}"
        return f"{told}  KL {logs['eval_kl']:.3f}  length {logs['eval_length']:.1f}"
    if "eval_loss" in logs:
        parts = [head, f"held-out loss {logs['eval_loss']:.4f}"]
        parts += [f"{name} {logs[f'eval_{key}']:{form}}" for key, name, form in _SHOWN if f"eval_{key}" in logs]
        return "  ".join(parts)
    return None


_SHOWN = (
    ("perplexity", "ppl", ".3f"),
    ("rewards/accuracies", "acc", ".1%"),
    ("rewards/margins", "margin", "+.4f"),
    ("accuracy", "acc", ".3f"),
    ("margin", "margin", ".3f"),
    ("objective/scores", "reward", ".4f"),
    ("objective/kl", "KL", ".3f"),
    ("completions/mean_length", "length", ".1f"),
    ("learning_rate", "lr", ".2e"),
    ("grad_norm", "grad", ".3f"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("trained_tokens_per_second", "trained/s", ",.0f"),
    ("peak_memory_gb", "mem GB", ".1f"),
    ("mfu", "mfu", ".1%"),
)


class PlainLines(TrainerCallback):  # type: ignore[misc]
    """One line a record, for logs."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and (text := line(logs, state.global_step, state.max_steps)):
            print(text, flush=True)


class ProgressBar(ProgressCallback):  # type: ignore[misc]
    """A bar for terminals, with the same lines above it."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            text = line(logs, state.global_step, state.max_steps)
            if text:
                self.training_bar.write(text)
