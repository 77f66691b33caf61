"""PPO of this project beside the last TRL that had it, 1.12.0, which lives in an environment of its own:

    python -m venv OTHER && OTHER/bin/pip install torch==2.13.0 trl==1.12.0
    python -m tests.benchmarks.ppo_against_trl --trl-python OTHER/bin/python [--cases llama opt] [--seeds 0 1 2]

prints the table of docs/benchmarks.md. The sides take turns, seed by seed, with the same models, prompts, reward and
settings, each in a process of its own. Time is taken where the reward is asked for, by both alike, from the first
rollout to the last: start-up, the first generation and the last updates are not counted. Processor time is there for
machines that do other work; with `--threads 1` it is hardly touched by that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import ppo_reward
from tests.benchmarks.ppo_case import CASES, Case, our_recipe, save_models, trl_settings, write_recipe

SIDES = ("TRL", "this project")
_BESIDE = Path(__file__).parent


@dataclass(frozen=True)
class Rollout:
    """One rollout as the reward saw it: clocks in seconds when it was complete, and its responses' mean reward."""

    at: float
    processor: float
    reward: float


@dataclass(frozen=True)
class Figures:
    """Of one training. Samples are responses; generation is its share of the time on the clock."""

    reward: float
    samples_per_second: float
    samples_per_processor_second: float
    generation: float


def rollouts(calls: Iterable[dict[str, Any]], size: int) -> list[Rollout]:
    """The rollouts of `size` responses that calls of the reward make up, in one call each or in several."""
    found: list[Rollout] = []
    scores: list[float] = []
    for call in calls:
        scores += [ppo_reward.score(text) for text in call["completions"]]
        if len(scores) > size:
            raise ValueError(f"calls of the reward do not add up to rollouts of {size}")
        if len(scores) == size:
            found.append(Rollout(call["at"], call["processor"], statistics.fmean(scores)))
            scores = []
    return found


def figures(run: Sequence[Rollout], generation: Sequence[float], case: Case) -> Figures:
    """Of whole cycles from the first rollout's reward to the last one's. `generation`: seconds, one a rollout."""
    seconds, processor = run[-1].at - run[0].at, run[-1].processor - run[0].processor
    samples = (len(run) - 1) * case.rollout_batch_size
    return Figures(
        reward=statistics.fmean(one.reward for one in run[-case.last :]),
        samples_per_second=samples / seconds,
        samples_per_processor_second=samples / processor,
        generation=sum(generation[1 : len(run)]) / seconds,
    )


def side(name: str, case: Case, seed: int, folder: Path, options: argparse.Namespace) -> list[Rollout] | Any:
    """One training of one side: its rollouts, and seconds of generation."""
    record, result = folder / "calls.jsonl", folder / "result.json"
    record.unlink(missing_ok=True)
    environment = os.environ | {ppo_reward.RECORD: str(record), "OMP_NUM_THREADS": str(options.threads)}
    if name == "TRL":
        (folder / "settings.json").write_text(json.dumps(trl_settings(case, folder, seed)), encoding="utf-8")
        words = [str(options.trl_python), str(_BESIDE / "ppo_trl_side.py"), str(folder / "settings.json"), str(result)]
        environment.pop("PYTHONPATH", None)
    else:
        write_recipe(folder / "recipe.yaml", our_recipe(case, folder, seed, folder / "run"))
        words = [sys.executable, "-m", "sft_dist", str(folder / "recipe.yaml")]
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {case.model}, seed {seed}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    run = rollouts((json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()), case.rollout_batch_size)
    return figures(run, generation_seconds(name, folder), case)
