"""What the benchmark of PPO beside TRL computes from the calls of the reward."""

from __future__ import annotations

import dataclasses

import pytest

from tests.benchmarks import ppo_reward
from tests.benchmarks.ppo_against_trl import OURS, TRL, Rollout, figures, rollouts, table
from tests.benchmarks.ppo_case import CASES, prompts

CASE = dataclasses.replace(CASES["llama"], rollout_batch_size=2, last=2)
FULL = ppo_reward.LETTER * ppo_reward.LETTERS


def call(at: float, *completions: str) -> dict[str, object]:
    return {"at": at, "processor": at / 2, "completions": list(completions)}


def test_rollouts_are_made_up_of_one_call_or_of_several() -> None:
    found = rollouts([call(1, FULL, ""), call(2, FULL), call(3, FULL)], 2)
    assert found == [Rollout(1, 0.5, 0.5), Rollout(3, 1.5, 1.0)]
    with pytest.raises(ValueError, match="do not add up to rollouts of 2"):
        rollouts([call(1, FULL), call(2, FULL, FULL)], 2)


def test_figures_are_of_whole_cycles_and_of_the_last_rewards() -> None:
    run = [Rollout(at, at / 2, reward) for at, reward in ((10, 0.0), (14, 0.5), (20, 1.0))]
    found = figures(run, [7.0, 1.0, 4.0, 9.0], CASE)
    assert found.reward == 0.75
    assert found.samples_per_second == 4 / 10
    assert found.samples_per_processor_second == 4 / 5
    # That of the first rollout, and of one behind the last, lies outside.
    assert found.generation == 5 / 10


def test_the_table_compares_seed_by_seed() -> None:
    cells = [
        {"model": "m", "side": side, "seed": seed, "reward": 0.5, "samples_per_second": 1.0,
         "samples_per_processor_second": speed, "generation": 0.25}
        for side, seed, speed in ((TRL, 0, 1.0), (TRL, 1, 4.0), (OURS, 0, 3.0), (OURS, 1, 4.0))
    ]  # fmt: skip
    lines = table(cells).splitlines()
    assert lines[2] == "| m | TRL | 0.50, 0.50 | 0.500 | 1.0 | 2.5 | 1.00 | 25% |"
    assert lines[3] == "| m | this project | 0.50, 0.50 | 0.500 | 1.0 | 3.5 | 2.00 | 25% |"


def test_prompts_are_uneven_or_of_one_length() -> None:
    lengths = [len(text) for text in prompts(CASE)]
    assert (min(lengths) < 6, max(lengths)) == (True, 100)
    assert sorted(lengths)[len(lengths) // 2] == pytest.approx(CASE.length, abs=2)
    assert {len(text) for text in prompts(dataclasses.replace(CASE, spread=0.0))} == {CASE.length}
