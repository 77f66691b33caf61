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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import ppo_reward
from tests.benchmarks.ppo_case import CASES, Case, our_recipe, save_models, trl_settings, write_recipe
from tests.recipes import ROOT

TRL, OURS = "TRL", "this project"


@dataclass(frozen=True)
class Rollout:
    """One rollout as the reward saw it: clocks in seconds when it was complete, and its responses' mean reward."""

    at: float
    processor: float
    reward: float


@dataclass(frozen=True)
class Figures:
    """Of one training. Samples are responses; `generation` is its share of the seconds on the clock."""

    reward: float
    samples_per_second: float
    samples_per_processor_second: float
    generation: float


def rollouts(calls: Iterable[dict[str, Any]], size: int) -> list[Rollout]:
    """The rollouts of `size` responses that calls of the reward make up, one call each or several."""
    found: list[Rollout] = []
    scores: list[float] = []
    for call in calls:
        scores += [ppo_reward.score(text) for text in call["completions"]]
        if len(scores) > size:
            raise ValueError(f"the calls of the reward do not add up to rollouts of {size}")
        if len(scores) == size:
            found.append(Rollout(call["at"], call["processor"], statistics.fmean(scores)))
            scores = []
    return found


def figures(run: Sequence[Rollout], generation: Sequence[float], case: Case) -> Figures:
    """Of whole cycles, from one rollout's reward to the next one's. `generation`: seconds, one number a rollout."""
    seconds, processor = run[-1].at - run[0].at, run[-1].processor - run[0].processor
    samples = (len(run) - 1) * case.rollout_batch_size
    return Figures(
        reward=statistics.fmean(one.reward for one in run[-case.last :]),
        samples_per_second=samples / seconds,
        samples_per_processor_second=samples / processor,
        generation=sum(generation[1 : len(run)]) / seconds,
    )


def train(side: str, case: Case, seed: int, folder: Path, options: argparse.Namespace) -> Figures:
    """One training of one side, in a process of its own."""
    record, result = folder / "calls.jsonl", folder / "result.json"
    record.unlink(missing_ok=True)
    environment = os.environ | {ppo_reward.RECORD: str(record), "OMP_NUM_THREADS": str(options.threads)}
    if side == TRL:
        (folder / "settings.json").write_text(json.dumps(trl_settings(case, folder, seed)), encoding="utf-8")
        script = str(Path(__file__).with_name("ppo_trl_side.py"))
        words = [str(options.trl_python), script, str(folder / "settings.json"), str(result)]
        environment.pop("PYTHONPATH", None)
    else:
        write_recipe(folder / "recipe.yaml", our_recipe(case, folder, seed, folder / "run"))
        words = [sys.executable, "-m", "sft_dist", str(folder / "recipe.yaml")]
        environment["PYTHONPATH"] = str(ROOT)
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        done = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"{side}, {case.model}, seed {seed}: exit code {done.returncode}\n{log.read()[-3000:]}")
    calls = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    run = rollouts(calls, case.rollout_batch_size)
    if len(run) != case.rollouts:
        raise SystemExit(f"{side}, {case.model}, seed {seed}: {len(run)} rollouts instead of {case.rollouts}")
    seconds = json.loads(result.read_text())["generation"] if side == TRL else our_generation(folder / "run")
    return figures(run, seconds, case)


def our_generation(run: Path) -> list[float]:
    """Seconds of generation of each rollout. A record is logged behind the updates of one, and before the next."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["time/generation"] for line in lines if "time/generation" in line]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds of a case; rewards of each seed besides. Ratios are those of seeds side by side."""
    lines = [
        "| model | PPO | last reward, seed by seed | mean | samples/s | samples/CPU s | to TRL | generation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        of_model = [cell for cell in cells if cell["model"] == model]
        speeds = {(cell["side"], cell["seed"]): cell["samples_per_processor_second"] for cell in of_model}
        for side in (TRL, OURS):
            own = [cell for cell in of_model if cell["side"] == side]
            ratios = [speeds[side, cell["seed"]] / speeds[TRL, cell["seed"]] for cell in own]
            means = {name: statistics.fmean(cell[name] for cell in own) for name in Figures.__dataclass_fields__}
            rewards = ", ".join(f"{cell['reward']:.2f}" for cell in own)
            lines.append(
                f"| {model} | {side} | {rewards} | {means['reward']:.3f} | {means['samples_per_second']:.1f} | "
                f"{means['samples_per_processor_second']:.1f} | {statistics.fmean(ratios):.2f} | "
                f"{means['generation']:.0%} |"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl-python", type=Path, required=True, help="interpreter of the environment of TRL 1.12.0")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file of all figures")
    options = parser.parse_args(words)
    cells: list[dict[str, Any]] = []
    for name in options.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            save_models(folder, case.model)
            for seed in options.seeds:
                for side in (TRL, OURS):
                    found = train(side, case, seed, folder, options)
                    cells.append({"model": name, "side": side, "seed": seed, **asdict(found)})
                    print(cells[-1], file=sys.stderr, flush=True)
                    # After each, so that a call that is cut short leaves what it has measured.
                    if options.json:
                        whole = {"case": {key: asdict(CASES[key]) for key in options.cases}, "cells": cells}
                        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
