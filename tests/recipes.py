"""Recipes and data for tests that run the real commands."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """ShareGPT records with very uneven numbers of trained tokens."""
    draw = random.Random(seed)
    words = "the quick brown fox jumps over a lazy dog and returns a list of strings".split()  # noqa: SIM905

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            turns = []
            for _ in range(draw.randint(1, 3)):
                turns.append({"from": "human", "value": text(8)})
                turns.append({"from": "gpt", "value": text(draw.choice([2, 60]))})
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Preference records of very uneven lengths; half of them have a margin. A word tells the chosen side."""
    draw = random.Random(seed)
    words = "the quick brown fox jumps over a lazy dog and returns a list of strings".split()  # noqa: SIM905

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            chosen, rejected = f"{text(draw.choice([2, 40]))} capital", f"{text(draw.choice([2, 40]))} France"
            pair = {"prompt": text(8), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(pair | ({"margin": number / count} if number % 2 else {})) + "\n")
    return path


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """A recipe file of the given sections."""
    path.write_text(yaml.safe_dump({"stage": "sft", **sections}, sort_keys=False))
    return path


def small_recipe(folder: Path, model: Path, records: int = 45) -> Path:
    """A recipe that trains a small model for a few seconds, in fp32, with a last incomplete batch."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(
        folder / "recipe.yaml",
        model={"model_name_or_path": str(model)},
        data={
            "dataset_name": str(write_conversations(folder / "train.jsonl", records)),
            "dataset_test_split": str(write_conversations(folder / "test.jsonl", 7, seed=1)),
        },
        train={
            "max_length": 256,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "bf16": False,
        },
        parallel={"global_batch_size": 4},
        output={"output_dir": str(folder / "run")},
        eval={"num_prompts": 2, "max_new_tokens": 4},
    )


def reward_recipe(folder: Path, model: Path, records: int = 9) -> Path:
    """A recipe that trains a small reward model for a few seconds, in fp32, with a last incomplete batch."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(small_recipe(folder, model).read_text())
    data = {
        "dataset_name": str(write_pairs(folder / "pairs.jsonl", records)),
        "dataset_test_split": str(write_pairs(folder / "held.jsonl", 7, seed=1)),
    }
    return write_recipe(
        folder / "recipe.yaml",
        **{**recipe, "stage": "reward", "data": data, "reward": {"center_rewards_coefficient": 0.01}},
    )


def dpo_recipe(folder: Path, model: Path, records: int = 21) -> Path:
    """The same for DPO."""
    recipe = yaml.safe_load(reward_recipe(folder, model, records).read_text())
    del recipe["reward"]
    return write_recipe(folder / "recipe.yaml", **{**recipe, "stage": "dpo"})


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command under test: the checkout on the path, caches of its own."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SFT_DIST_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "100",
    }


def hear_interrupts() -> None:
    """For a process that is started (`preexec_fn`): a shell's background jobs, and so a CI's, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def sft_dist(folder: Path, *words: str, limit: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the `sft-dist` command."""
    return command(folder, sys.executable, "-m", "launch.cli", *words, limit=limit)


def command(folder: Path, *words: str, limit: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run any command in `folder`, with its output as text."""
    return subprocess.run(
        words,
        cwd=folder,
        env={**environment(folder), **variables},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def records(run: Path) -> list[dict[str, Any]]:
    """The training records of a run's `metrics.jsonl`, one an optimizer step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
