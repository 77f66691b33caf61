"""Small runs of PPO: recipes, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.checkpoints.pieces import WEIGHT, Reader
from sft_dist.ppo.rollout import Rollout, from_document
from tests import letters
from tests.recipes import write_recipe

# Some steps of `sampled` go beyond it, and some do not.
TARGET_KL = 0.1
# Each case has another kind of value and of reward, and draws or does not.
CASES: dict[str, tuple[str, ...]] = {
    "greedy": ("ppo.temperature=0", "ppo.reward_norm=true", "ppo.kl_target=2", "ppo.kl_horizon=50"),
    "sampled": (
        "ppo.value_model=shared",
        "ppo.entropy_coef=0.01",
        "ppo.kl_estimator=k3",
        "ppo.whiten_rewards=true",
        "ppo.ptx_coef=0.5",
        f"ppo.target_kl={TARGET_KL}",
    ),
    "lora": ("peft.use_peft=true", "peft.lora_dropout=0", "peft.lora_r=4", "train.learning_rate=1e-2"),
    "lora-shared": ("peft.use_peft=true", "peft.lora_dropout=0", "peft.lora_r=4", "ppo.value_model=shared"),
}
ROLLOUTS, STEPS_PER_ROLLOUT = 3, 4
# What is trained on beside the rollouts where `ptx_coef` is set: as many records as a step has responses.
BESIDE = (("ab", "cdef"), ("j", "i"), ("abcde", "fghijfghij"), ("ca", "b"))


def small_recipe(folder: Path, architecture: str = "llama") -> Path:
    """Three rollouts of eight prompts, two epochs over each in two mini-batches; every second step is kept.

    The rewards are a model's and a function's. Beside it lies `beside.jsonl`.
    """
    model = letters.save_model(folder / architecture, architecture, initializer_range=0.3)
    scorer = letters.save_reward_model(folder / f"{architecture}-reward", architecture, initializer_range=0.3)
    beside = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in BESIDE]
    (folder / "beside.jsonl").write_text("\n".join(beside) + "\n")
    rewards = {"scorer": {"model": str(scorer), "weight": 0.5}, "share": {"function": "tests.letters:share"}}
    return write_recipe(
        folder / f"{architecture}.yaml",
        stage="ppo",
        model={"model_name_or_path": str(model)},
        data={"dataset_name": str(letters.write_prompts(folder / f"{architecture}.jsonl", 24))},
        ppo={"rewards": rewards, "response_length": letters.ROOM, "rollout_batch_size": 8, "num_ppo_epochs": 2,
             "rollout_micro_batch_size": 3},
        # No tiny epsilon, which lets round-off grow (docs/parity.md).
        train={"max_length": 32, "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 2e-3,
               "adam_epsilon": 1e-4, "logging_steps": 1, "bf16": False, "report_to": "none", "save_strategy": "steps",
               "save_steps": 2, "full_determinism": True},
        checkpoint={"keep": None},
        parallel={"global_batch_size": 4},
        output={"output_dir": str(folder / "run")},
        eval={"enabled": False},
    )  # fmt: skip


def job(folder: Path, recipe: Path, name: str, *words: str) -> list[str]:
    """A run of a recipe under a name, for `tests.ranks.do_runs`."""
    beside = [f"ppo.ptx_dataset_name={folder / 'beside.jsonl'}"] if "ppo.ptx_coef=0.5" in words else []
    return [str(recipe), *words, *beside, f"output.output_dir={folder / name}"]


def rollouts_of(run: Path) -> list[Rollout]:
    """Every rollout of a run, with all that the models said of it, from a checkpoint behind its second step."""
    found = []
    while (file := _checkpoint(run, len(found) * STEPS_PER_ROLLOUT + 2) / "rollout.json").exists():
        found.append(from_document(file.read_text()))
    return found


def told_of(run: Path) -> list[dict[str, Any]]:
    """The numbers of each rollout as they are kept for people."""
    return [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]


def weights_at(run: Path, step: int, part: str) -> dict[str, np.ndarray]:
    """The weights of one of the actors (`policy`, `value`) behind a step, in float64."""
    folder = _checkpoint(run, step)
    reader = Reader(folder.glob("*.safetensors"), json.loads((folder / "common.json").read_text())["shapes"])
    names = [name for name in reader.names() if name.startswith(f"{part}.")]
    return {
        name.removeprefix(f"{part}."): reader.read(name, WEIGHT, 0, reader.size(name, WEIGHT))
        .double()
        .numpy()
        .reshape(reader.shapes[name])
        for name in names
    }


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint-{step}"


def learning_recipe(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Rollouts of 64 prompts, four epochs over each in two mini-batches, for a reward yet to be named. `seed`: of the
    model."""
    model = letters.save_model(folder / architecture, architecture, seed, letters.PLAIN)
    return write_recipe(
        folder / f"{architecture}.yaml",
        stage="ppo",
        model={"model_name_or_path": str(model)},
        data={"dataset_name": str(letters.write_prompts(folder / "prompts.jsonl", 64))},
        ppo={"response_length": letters.ROOM, "rollout_batch_size": 64, "kl_coef": 0.001},
        train={"max_length": 32, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
               "learning_rate": 2e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "bf16": False,
               "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False},
        parallel={"global_batch_size": 32},
        output={"output_dir": str(folder / "run")},
        eval={"enabled": False},
    )  # fmt: skip
