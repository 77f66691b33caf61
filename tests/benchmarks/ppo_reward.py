"""The reward of tests.benchmarks.ppo_against_trl, and its clock. Both sides call it; it needs nothing but Python."""

from __future__ import annotations

import json
import os
import time
from typing import Any

LETTER = "a"
# As many tokens have the responses of the small models, where a token is a letter: 1 is the most they can reach.
LETTERS = 16
# Names the file that every call adds a line to: seconds on the clock, of processor time, and the completions.
RECORD = "PPO_BENCHMARK_RECORD"


def score(text: str) -> float:
    """How often the letter comes, by the letters of a response of full length."""
    return text.count(LETTER) / LETTERS


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """In the form of TRL's reward functions. From one rollout's call to the next is one whole cycle of PPO."""
    if RECORD in os.environ:
        line = {"at": time.perf_counter(), "processor": time.process_time(), "completions": completions}
        with open(os.environ[RECORD], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return [score(text) for text in completions]
