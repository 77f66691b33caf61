"""What checkpoints cost: the stall of a save, bytes, and the time to the first step of a resumed run.

    python -m tests.benchmarks.checkpoints [--processes 2]

trains SmolLM2-135M in fp32 on a few short rows, with checkpoints that are waited for and with those that are written
beside the training, by turns in the same processes, and prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from sft_dist import builtin_models
from sft_dist.checkpoints import manifest
from tests.ranks import do_runs
from tests.recipes import environment, write_conversations

_SAVED = re.compile(r"checkpoint-(\d+): ([\d.]+) GB in ([\d.]+) s, for which the training waited ([\d.]+) s")
_STEPS, _EVERY = 12, 4


def recipe(folder: Path, processes: int) -> Path:
    """A recipe whose steps are about as long as a write."""
    write_conversations(folder / "train.jsonl", 400)
    file = folder / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "stage": "sft",
                "model": {"model_name_or_path": builtin_models.NAME},
                "data": {"dataset_name": str(folder / "train.jsonl")},
                "train": {"max_length": 128, "per_device_train_batch_size": 2, "max_steps": _STEPS, "bf16": False,
                          "logging_steps": 1, "report_to": [], "save_strategy": "steps", "save_steps": _EVERY},
                "parallel": {"strategy": "ddp", "processes": processes},
                "checkpoint": {"keep": 1},
                "output": {"output_dir": str(folder / "run"), "overwrite": True},
                "eval": {"enabled": False},
            }
        )
    )  # fmt: skip
    return file


def saves(folder: Path, file: Path, processes: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each save and seconds that the training waited for it, of the second and later saves of each run."""
    kinds = ["checkpoint.asynchronous=false", "checkpoint.asynchronous=true"] * rounds
    jobs = [[str(file), kind, f"output.output_dir={folder / 'run'}"] for kind in kinds]
    log = do_runs(folder, "ddp", processes, jobs)[0].read_text()
    found: dict[str, list[tuple[float, float]]] = {}
    every = iter(_SAVED.findall(log))
    for kind in kinds:
        of_run = [next(every) for _ in range(_STEPS // _EVERY)]
        # The first allocates the memory that the later ones use again.
        found.setdefault(kind + ", first", []).append((float(of_run[0][2]), float(of_run[0][3])))
        found.setdefault(kind, []).extend((float(one[2]), float(one[3])) for one in of_run[1:])
    return found


def first_step(folder: Path, file: Path, *words: str) -> float:
    """Seconds from the start of the command to the first step that it logs, into a log that is empty or not there."""
    log = folder / "run" / "metrics.jsonl"
    began = time.perf_counter()
    command = [sys.executable, "-m", "launch.cli", "run", str(file), *words]
    with subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
            time.sleep(0.01)
        took = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    return took


def fresh_and_resumed(folder: Path, file: Path) -> tuple[float, float]:
    """The same of a first start, and of one that goes on from the second of four steps."""
    run = folder / "run"
    words = ("train.max_steps=4", "train.save_steps=2", "checkpoint.keep=null")
    shutil.rmtree(run)
    fresh = first_step(folder, file, *words)
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "metrics.jsonl").unlink()
    return fresh, first_step(folder, file, *words, "output.overwrite=false", "output.resume=true")


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = recipe(folder, options.processes)
        found = saves(folder, file, options.processes, options.rounds)
        whole = statistics.median(waited for _, waited in found["checkpoint.asynchronous=false"])
        print("| save | seconds of the save | the training waited, s | to a save that is waited for |")
        print("|---|---|---|---|")
        for kind, times in found.items():
            took, waited = (statistics.median(column) for column in zip(*times, strict=True))
            setting, _, which = kind.partition(",")
            print(f"| `{setting}`{which} | {took:.2f} | {waited:.2f} | {waited / whole:.1%} |")
        newest = max((folder / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        held = manifest.read(newest)
        shapes = json.loads((newest / "common.json").read_text())["shapes"]
        weights = sum(torch.Size(sizes).numel() for sizes in shapes.values())
        print(f"\nbytes: {held.bytes:,} written, {12 * weights:,} of weights and Adam's states in fp32: "
              f"{held.bytes / (12 * weights):.4f}")  # fmt: skip
        fresh, resumed = fresh_and_resumed(folder, file)
        print(f"first step: {fresh:.1f} s after a first start, {resumed:.1f} s after one that goes on")


if __name__ == "__main__":
    main()
