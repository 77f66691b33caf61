"""PPO by the last TRL that had it, in an environment of its own: python ppo_trl_side.py SETTINGS.json RESULT.json

Needs nothing of this project but ppo_reward.py beside it. tests.benchmarks.ppo_against_trl writes SETTINGS and reads
RESULT: the versions of the libraries, and seconds of generation, one number a rollout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import ppo_reward
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

_SAME_NAMES = ("num_ppo_epochs", "num_mini_batches", "learning_rate", "kl_coef", "cliprange", "cliprange_value",
               "vf_coef", "gamma", "lam", "temperature", "response_length", "missing_eos_penalty", "seed")  # fmt: skip


class Reward(torch.nn.Module):
    """The reward function in the place of a reward model."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, queries: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """Rewards (rows) of responses (rows, tokens)."""
        texts = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (queries, responses)]
        return torch.tensor(ppo_reward.reward(*texts))


def watch() -> list[float]:
    """Let TRL ask the function for rewards, and take the time of its generation, of which the list is filled.

    The trainer looks both up in its module. A model in the place of the reward model would not do: it is not told
    where the prompt ends.
    """
    seconds: list[float] = []
    generate, get_reward = ppo_trainer.batch_generation, ppo_trainer.get_reward

    def timed_generation(*words: Any) -> Any:
        start = time.perf_counter()
        generated = generate(*words)
        seconds.append(time.perf_counter() - start)
        return generated

    def reward(model: Any, rows: torch.Tensor, pad: int, context: int) -> Any:
        if isinstance(model, Reward):
            return None, model(rows[:, :context], rows[:, context:]), None
        return get_reward(model, rows, pad, context)

    ppo_trainer.batch_generation, ppo_trainer.get_reward = timed_generation, reward
    return seconds


def arguments(settings: dict[str, Any]) -> PPOConfig:
    """One micro-batch holds a whole mini-batch.

    With accumulation this trainer takes one optimizer step an epoch, not one a mini-batch: `Accelerator.accumulate`
    counts up to the micro-batches of the whole rollout.
    """
    batch = settings["rollout_batch_size"]
    return PPOConfig(
        output_dir=f"{settings['folder']}/trl",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=batch,
        total_episodes=batch * settings["rollouts"],
        stop_token="eos",
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{name: settings[name] for name in _SAME_NAMES},
    )


def main(settings: dict[str, Any], result: Path) -> None:
    folder = settings["folder"]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{folder}/model") for _ in range(2))
    seconds = watch()
    rows = Dataset.from_list([{"input_ids": ids} for ids in settings["prompts"]])
    value = AutoModelForSequenceClassification.from_pretrained(f"{folder}/value", num_labels=1)
    # Its data loader cannot be left without rows to evaluate, of which nothing is made here.
    trainer = PPOTrainer(arguments(settings), tokenizer, policy, reference, Reward(tokenizer), rows, value,
                         eval_dataset=rows)  # fmt: skip
    trainer.train()
    versions = {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")}
    result.write_text(json.dumps({"versions": versions, "generation": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
