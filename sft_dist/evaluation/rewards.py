"""What a reward model is measured by: its rewards for held-out pairs, before and after training, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.mixture_sources import title_of
from sft_dist.data.rows import Prepared, turns_of
from sft_dist.evaluation.facts import curve_of, facts_of, summary_of
from sft_dist.evaluation.generation import as_messages
from sft_dist.render.rewards import RewardMeasure, RewardReport, ScoredPair, histogram, to_html, to_terminal
from sft_dist.render.wording import count
from sft_dist.rundir import RunDir, write_text

if TYPE_CHECKING:
    from sft_dist.trainers.reward import RewardTrainer

# Pairs of each end that the page shows.
_SHOWN = 5


@dataclass(frozen=True)
class Result:
    """The measure of held-out pairs and the rewards (chosen, rejected) of each, in the order of the rows."""

    measure: RewardMeasure
    rewards: list[tuple[float, float]]


def measured(
    trainer: RewardTrainer, held_out: Prepared | None, when: str, say: Callable[[str], None]
) -> Result | None:  # fmt: skip
    """The result, or None where the recipe holds nothing out; all ranks call it together and all get it."""
    if held_out is None:
        return None
    say(f"measuring {when} training: {count(len(held_out.rows), 'held-out pair')}")
    found = trainer.evaluate(metric_key_prefix=when)
    names = ("loss", "accuracy", "margin", "mean_reward", "reward_std")
    measure = RewardMeasure(**{name: found[f"{when}_{name}"] for name in names}, pairs=int(found[f"{when}_pairs"]))
    assert trainer.held_out_rewards is not None
    return Result(measure, [(chosen, rejected) for chosen, rejected in trainer.held_out_rewards.tolist()])


def before(run: RunDir) -> Result | None:
    """The result that was taken before training, or None."""
    if not run.before.exists():
        return None
    held = json.loads(run.before.read_text(encoding="utf-8"))
    return Result(RewardMeasure(**held["measure"]), [(chosen, rejected) for chosen, rejected in held["rewards"]])


def report(
    recipe: Recipe, run: RunDir, trainer: RewardTrainer, train: Account, held_out: Prepared | None,
    after: Result | None, seconds: float,
) -> None:  # fmt: skip
    """Write summary, the rewards of all held-out pairs and the page, and show the table."""
    from rich.console import Console

    first = before(run) if recipe.eval.enabled else None
    pairs = _pairs(held_out, first, after)
    bins = histogram(_margins(first), _margins(after))
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].margin)
    shown = min(_SHOWN, (len(order) + 1) // 2)
    facts = facts_of(trainer, run, seconds)
    if pairs:
        facts += [("pairs", str(run.rewards)), ("page", str(run.comparison))]
    found = RewardReport(
        title=recipe.train.run_name or run.root.name,
        model=recipe.model.model_name_or_path,
        dataset=title_of(recipe.data),
        before=first.measure if first else None,
        after=after.measure if after else None,
        histogram=bins,
        worst=tuple(pairs[i] for i in order[:shown]),
        best=tuple(pairs[i] for i in reversed(order[len(order) - shown :])),
        facts=tuple(facts),
        curve=curve_of(trainer),
    )
    summary = summary_of(trainer, train, held_out, found.before, found.after, seconds,
                         margins=asdict(bins) if bins else None)  # fmt: skip
    write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    if pairs:
        lines = (json.dumps(asdict(pair) | {"margin": pair.margin}, ensure_ascii=False) + "\n" for pair in pairs)
        write_text(run.rewards, "".join(lines))
        write_text(run.comparison, to_html(found))
    to_terminal(found, Console(width=None if sys.stdout.isatty() else 100))


def _margins(result: Result | None) -> Any:
    return None if result is None else np.array([chosen - rejected for chosen, rejected in result.rewards])


def _pairs(held_out: Prepared | None, first: Result | None, last: Result | None) -> list[ScoredPair]:
    """The held-out pairs with their rewards; none where they were not measured."""
    if held_out is None or not (first or last):
        return []
    nothing = [None] * len(held_out.rows)
    return [
        ScoredPair(row["where"], as_messages(turns_of(row)), row["chosen"], row["rejected"], a, b)
        for row, a, b in zip(
            held_out.rows, first.rewards if first else nothing, last.rewards if last else nothing, strict=True
        )
    ]
