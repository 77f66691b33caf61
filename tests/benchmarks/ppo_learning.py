"""What PPO learns: a small Llama and a small OPT, three tasks whose optimum is known, three seeds.

`python -m tests.benchmarks.ppo_learning --image docs/ppo-learning.svg` prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.ppo_learning_picture import learning_svg
from tests.ppo_runs import learning_recipe, told_of
from tests.ranks import do_runs

MODELS, TASKS, SEEDS = ("llama", "opt"), ("share", "length", "pattern"), (0, 1, 2)
ROLLOUTS, GOAL = 80, 0.9
# Below what the task leads to when nothing holds it, and beyond what nine tenths of the optimum take.
TARGET, STEERED_TASK = 25.0, "pattern"
STEERED = (f"ppo.kl_target={TARGET}", "ppo.kl_coef=0.02", "ppo.kl_horizon=640")

Told = list[dict[str, Any]]


def main() -> None:
    """Run, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="where the picture goes")
    parser.add_argument("--folder", type=Path, help="where the runs go, and what was run before is taken from")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ppo-learning-"))
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_job(folder, model, task, seed) for model in MODELS for task in TASKS for seed in SEEDS]
    jobs += [_job(folder, model, STEERED_TASK, seed, steered=True) for model in MODELS for seed in SEEDS]
    left = [job for job in jobs if not (Path(job[-1].partition("=")[2]) / "summary.json").exists()]
    if left:
        do_runs(folder, "single", 1, left)
    curves = {
        (task, model): [told_of(_run(folder, model, task, seed)) for seed in SEEDS]
        for task in TASKS
        for model in MODELS
    }
    print(learned_table(curves))
    print()
    print(
        steered_table(
            {m: [told_of(_run(folder, m, STEERED_TASK, seed, steered=True)) for seed in SEEDS] for m in MODELS}
        )
    )
    if options.image:
        about = f"mean of three seeds, between the least and the most; {ROLLOUTS} rollouts of 64 responses"
        options.image.write_text(learning_svg(curves, "What PPO learns", about, GOAL), encoding="utf-8")


def _run(folder: Path, model: str, task: str, seed: int, steered: bool = False) -> Path:
    return folder / f"{model}-{task}-{seed}{'-steered' if steered else ''}"


def _job(folder: Path, model: str, task: str, seed: int, steered: bool = False) -> list[str]:
    where = folder / f"seed{seed}"
    where.mkdir(exist_ok=True)
    return [
        str(learning_recipe(where, model, seed)), f"ppo.reward=tests.letters:{task}", f"train.seed={seed}",
        f"train.num_train_epochs={ROLLOUTS}", "train.lr_scheduler_type=linear", "output.overwrite=true",
        *(STEERED if steered else ()),
        f"output.output_dir={_run(folder, model, task, seed, steered)}",
    ]  # fmt: skip


def reached(told: Sequence[dict[str, Any]], goal: float) -> int | None:
    """The number of rollouts that were trained on when the next one had this mean reward."""
    return next((one["rollout"] for one in told if one["objective/scores"] >= goal), None)


def learned_table(curves: dict[tuple[str, str], list[Told]]) -> str:
    """Of each task and model: the rollouts to nine tenths of the optimum, and where it ended, by seed."""
    lines = [
        f"| task | model | reward at first | rollouts to {GOAL:.0%} of the best | last reward | last KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for (task, model), seeds in curves.items():
        rollouts = ", ".join(str(reached(told, GOAL) or f"not in {len(told)}") for told in seeds)
        first, last, kl = (
            ", ".join(f"{told[place][name]:.{digits}f}" for told in seeds)
            for place, name, digits in (
                (0, "objective/scores", 2),
                (-1, "objective/scores", 2),
                (-1, "objective/kl", 0),
            )
        )
        lines.append(f"| {task} | {model} | {first} | {rollouts} | {last} | {kl} |")
    return "\n".join(lines)


def steered_table(curves: dict[str, list[Told]]) -> str:
    """Of each model with a KL target: reward, KL and its weight over the last ten rollouts, by seed."""
    lines = ["| model | seed | reward | KL, nats | highest KL | weight |", "|---|---|---|---|---|---|"]
    for model, seeds in curves.items():
        for seed, told in zip(SEEDS, seeds, strict=True):
            reward, kl, weight = (
                sum(one[name] for one in told[-10:]) / 10
                for name in ("objective/scores", "objective/kl", "objective/kl_coef")
            )
            most = max(one["objective/kl"] for one in told)
            lines.append(f"| {model} | {seed} | {reward:.2f} | {kl:.1f} | {most:.1f} | {weight:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
