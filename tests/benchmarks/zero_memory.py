"""Peak memory of a process under DDP and ZeRO-1, 2 and 3, against the formulas of the ZeRO paper.

    python -m tests.benchmarks.zero_memory [--processes 4]

trains SmolLM2-135M in fp32 on short rows for a few steps under each, and prints the table of docs/benchmarks.md. What
a process holds besides model states (libraries, activations, buffers) is measured by the same run of a model of hardly
any weights, and taken off.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from sft_dist import builtin_models
from sft_dist.modelinfo import count_parameters
from tests import tiny
from tests.recipes import environment, write_conversations

_STEPS = 3
# glibc keeps freed blocks of a few MB, such as gathered weights, for itself, and they would count as held.
_FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def formula(strategy: str, weights: int, processes: int) -> float:
    """Bytes of fp32 weights (4), gradients (4) and Adam's states (K = 8) on a process.

    Rajbhandari et al. 2020 (ZeRO), figure 1, with 4 bytes instead of 2 for weights and gradients: stage 1 shards the
    states, stage 2 the gradients as well, stage 3 all. DeepSpeed keeps one more fp32 copy of the weights that a process
    updates, the master weights, of which the paper counts 4 of its K = 12.
    """
    master = 4 if strategy.startswith("zero") else 0
    whole, sharded = {"ddp": (16, 0), "zero1": (8, 8 + master), "zero2": (4, 12 + master), "zero3": (0, 16 + master),
                      "fsdp2": (0, 16)}[strategy]  # fmt: skip
    return weights * (whole + sharded / processes)


def peak(folder: Path, model: str, strategy: str, processes: int) -> float:
    """The most memory of its own that any process of a run held, in bytes; mapped files are not its own."""
    run = folder / f"{strategy}-{Path(model).name}"
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "stage": "sft",
                "model": {"model_name_or_path": model},
                "data": {"dataset_name": str(folder / "train.jsonl")},
                "train": {"max_length": 64, "per_device_train_batch_size": 1, "max_steps": _STEPS, "bf16": False,
                          "logging_steps": 1, "report_to": []},
                "parallel": {"strategy": strategy, "processes": processes},
                "output": {"output_dir": str(run)},
                "eval": {"enabled": False},
            }
        )
    )  # fmt: skip
    launcher = psutil.Popen(
        [sys.executable, "-m", "launch.cli", "run", str(recipe)],
        env={**environment(folder), **_FREED_AT_ONCE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    most, steps = 0, run / "metrics.jsonl"
    while launcher.poll() is None:
        # What writes the model holds a file of it, which is the whole of a small one.
        if not steps.exists() or steps.read_text().count('"loss"') < _STEPS:
            most = max(most, _most_of_children(launcher))
        time.sleep(0.02)
    if launcher.returncode:
        raise SystemExit(f"{strategy}: the run ended with {launcher.returncode}")
    return float(most)


def _most_of_children(launcher: psutil.Popen) -> int:
    found = [0]
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in launcher.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                memory = child.memory_info()
                found.append(memory.rss - memory.shared)
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=4)
    size = parser.parse_args().processes
    weights = count_parameters(builtin_models.CONFIG)
    assert weights is not None
    print(f"{weights / 1e6:.1f} M weights, {size} processes\n")
    print("| strategy | peak, GB | of a tiny model, GB | model states, GB | by the formula, GB | ratio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_conversations(folder / "train.jsonl", 4 * size)
        tiny_model = str(tiny.save_model(folder / "tiny"))
        for strategy in STRATEGIES:
            base = peak(folder, tiny_model, strategy, size)
            whole = peak(folder, builtin_models.NAME, strategy, size)
            expected = formula(strategy, weights, size)
            print(
                f"| {strategy} | {whole / 1e9:.2f} | {base / 1e9:.2f} | {(whole - base) / 1e9:.2f} | "
                f"{expected / 1e9:.2f} | {(whole - base) / expected:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
