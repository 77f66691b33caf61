"""What the benchmark of training measures, its arithmetic and its table. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


class Way(Enum):
    """Who trains, and on which rows."""

    TRL_PADDED = "TRL, padded"
    TRL_PACKED = "TRL, packed"
    PADDED = "this project, padded"
    PACKED = "this project, packed"
    COMPILED = "this project, packed, torch.compile"

    @property
    def ours(self) -> bool:
        return self not in (Way.TRL_PADDED, Way.TRL_PACKED)

    @property
    def packed(self) -> bool:
        return self not in (Way.TRL_PADDED, Way.PADDED)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained, the same for all ways.

    `model`: a shape of `sft_measure.SHAPES` with random weights, or the built-in model. `dtype`: of the weights;
    float32 ones are computed with in bf16 autocast. `length`: tokens of the longest row; `rows`: of a micro-batch.
    `uncounted`, `steps`: optimizer steps before the clock starts, and on it. `data`: `python-docs`, or `corpus` for
    the longer conversations of `tests.benchmarks.corpus`.
    """

    model: str
    lora: bool = False
    dtype: str = "float32"
    length: int = 2048
    rows: int = 8
    accumulation: int = 2
    checkpointing: bool = False
    uncounted: int = 5
    steps: int = 20
    data: str = "corpus"
    bf16: bool = True
    optim: str = "adamw_torch_fused"


# By hand, for 80 GB. OPT-1.3B in full: 16 bytes a weight (weights, gradients, two moments) are 21 GB. Llama 7B in
# full would be 108 GB, so: LoRA over frozen bf16 weights (13.5 GB) and, of its own name, all weights in bf16 with
# their gradients and moments (54 GB), where activations have to be recomputed.
CASES = {
    "opt-1.3b": Case("opt-1.3b"),
    "llama-7b": Case("llama-7b", lora=True, dtype="bfloat16", rows=2, accumulation=8),
    "llama-7b-full": Case("llama-7b", dtype="bfloat16", rows=4, accumulation=4, checkpointing=True),
    "smollm2-135m": Case("smollm2-135m", length=256, rows=4, accumulation=2, uncounted=1, steps=2,
                         data="python-docs", bf16=False),
    "tiny": Case("tiny", length=128, rows=2, uncounted=1, steps=2, data="python-docs"),
}  # fmt: skip
ON_A_GPU, ON_A_PROCESSOR = ("opt-1.3b", "llama-7b", "llama-7b-full"), ("smollm2-135m",)


def case_of(name: str, steps: int | None) -> Case:
    """A case by its name, on the clock for `steps` where they are given."""
    return CASES[name] if steps is None else replace(CASES[name], steps=steps)


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds. `real`: tokens of documents; `trained`: of those, what the loss is of; `positions`:
    real ones and padding; `squares`: the sum over its documents of their squared lengths."""

    real: int = 0
    trained: int = 0
    positions: int = 0
    squares: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.real + other.real,
            self.trained + other.trained,
            self.positions + other.positions,
            self.squares + other.squares,
        )


def counts_of(documents: Sequence[Mapping[str, Any]], positions: int) -> Counts:
    """The counts of a micro-batch of these documents, each with `input_ids` and `labels`."""
    lengths = [len(document["input_ids"]) for document in documents]
    # A document's first token has nothing before it that it could be predicted from.
    trained = sum(label != -100 for document in documents for label in list(document["labels"])[1:])
    return Counts(sum(lengths), int(trained), positions, sum(length * length for length in lengths))


def seen_length(counts: Counts) -> float:
    """T of :func:`sft_dist.metrics.flops_per_token`: the length of the document that a token lies in, on average.

    6 N + 12 L H T for each of the T tokens of each document sums to (6 N + 12 L H sum(T^2) / sum(T)) sum(T).
    """
    return counts.squares / counts.real


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation of one device: tokens/s x FLOPs a token / the device's dense bf16 peak in FLOP/s.

    Chowdhery et al. 2022 (PaLM), appendix B: what the model's own arithmetic needs, 6 N + 12 L H T a token, without
    recomputation. Tokens are real ones: padding is work that the device does and the model has no use for.
    """
    return tokens_per_second * flops_per_token / peak


def figures(
    counts: Counts, seconds: float, cpu_seconds: float, flops: float, peak: float | None, memory: int
) -> dict[str, Any]:
    """The figures of a measurement: tokens/s, `fill` and `mfu` as shares, `peak_memory_gb` in 1e9 bytes.

    `seconds`: by the clock. `cpu_seconds`: of processor time, over all cores, which on a processor tells the work
    whatever else the machine does. `flops`: of one real token. `peak`: of the device, None where it is not known.
    """
    speed = counts.real / seconds
    return {
        "tokens_per_second": speed,
        "trained_tokens_per_second": counts.trained / seconds,
        "fill": counts.real / counts.positions,
        "mfu": None if peak is None else mfu(speed, flops, peak),
        "peak_memory_gb": memory / 1e9,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_cpu_second": counts.real / cpu_seconds,
        "tokens": counts.real,
        "trained_tokens": counts.trained,
        "flops_per_token": flops,
    }


_HEADS = ("model", "rows", "attention", "real tokens", "real tokens/s", "to TRL's padded", "trained/s", "MFU",
          "memory, GB")  # fmt: skip


def table(cells: Sequence[Mapping[str, Any]], cuda: bool) -> str:
    """Markdown of all measurements, each with `model`, `way`, `attention` and either `figures` or a `fault`.

    Without a GPU tokens are told by the second of processor time, of one core.
    """
    second = "seconds" if cuda else "cpu_seconds"
    padded = {
        cell["model"]: cell["figures"]["tokens"] / cell["figures"][second]
        for cell in cells
        if cell["way"] == Way.TRL_PADDED.value and "figures" in cell
    }
    heads = [head if cuda else head.replace("/s", "/CPU s") for head in _HEADS]
    rule = "|" + "---|" * len(heads)
    lines = [_line(cell, second, padded.get(cell["model"])) for cell in cells]
    return "\n".join([f"| {' | '.join(heads)} |", rule, *lines])


def _line(cell: Mapping[str, Any], second: str, padded: float | None) -> str:
    head = f"| {cell['model']} | {cell['way']} | {cell.get('attention', '')} |"
    if "figures" not in cell:
        return f"{head} {cell['fault']} | | | | | |"
    found = cell["figures"]
    speed, learned = found["tokens"] / found[second], found["trained_tokens"] / found[second]
    ratio = "" if padded is None else f"{speed / padded:.2f}"
    share = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return (
        f"{head} {found['fill']:.1%} | {speed:,.0f} | {ratio} | {learned:,.0f} | {share} | "
        f"{found['peak_memory_gb']:.1f} |"
    )
