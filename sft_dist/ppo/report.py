"""What a PPO run leaves for people: the summary, a table, and a page of curves and responses."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sft_dist.data.account import Account
from sft_dist.data.mixture_sources import title_of
from sft_dist.render.page import escape, formatted, header, page, pairs
from sft_dist.render.panels import Panel, panels_svg
from sft_dist.render.text import tolerate_encoding
from sft_dist.render.wording import duration
from sft_dist.rundir import RunDir, write_text
from sft_dist.stages import Setting

if TYPE_CHECKING:
    from rich.console import Console

    from sft_dist.trainers.ppo import Measured, PPOTrainer

# Names in the records, and those for people; digits.
_ROWS = (
    ("objective/scores", "reward", 3),
    ("objective/kl", "KL to the reference, nats a response", 3),
    ("objective/entropy", "entropy, nats a token", 3),
    ("completions/mean_length", "length, tokens", 1),
    ("completions/repetition", "repeated 4-grams", 3),
    ("completions/ended", "ended by themselves", 3),
)


@dataclass(frozen=True)
class Sides:
    """The measure before and after training; None where it was not taken."""

    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, before, after and change of each number, as text."""
        found = []
        every = dict.fromkeys([*(self.before or {}).get("numbers", {}), *(self.after or {}).get("numbers", {})])
        named = [*_ROWS, *((name, name, 3) for name in every if name.startswith("rewards/"))]
        for name, title, digits in named:
            values = [side and side["numbers"].get(name) for side in (self.before, self.after)]
            texts = ["" if value is None else f"{value:,.{digits}f}" for value in values]
            moved = "" if None in values else f"{values[1] - values[0]:+,.{digits}f}"  # type: ignore[operator]
            found.append((title, *texts, moved))
        return found


def write_report(setting: Setting, trainer: PPOTrainer, train: Account, after: Measured | None, seconds: float) -> None:
    """Write the summary and the page, and show the table. `seconds`: of the whole run."""
    from rich.console import Console

    run = setting.run
    sides = Sides(_before(run) if setting.recipe.eval.enabled else None, None if after is None else asdict(after))
    rollouts = [json.loads(line) for line in _lines(run)]
    facts = _facts(setting, trainer, rollouts, seconds)
    summary = {
        "data": {"train": asdict(train)},
        "steps": trainer.state.global_step,
        "rollouts": len(rollouts),
        "before": sides.before and sides.before["numbers"],
        "after": sides.after and sides.after["numbers"],
        "processes": trainer.args.world_size,
        "seconds": seconds,
        **trainer.throughput.overall(),
    }
    write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    title = setting.recipe.train.run_name or run.root.name
    if after is not None:
        write_text(run.answers, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in after.samples))
    about = [("policy", setting.recipe.model.model_name_or_path), ("prompts", title_of(setting.recipe.data))]
    write_text(run.comparison, _page(title, about, sides, rollouts, setting.recipe.ppo.kl_target, facts))
    _show(title, sides, facts, Console(width=None if sys.stdout.isatty() else 100))


def _lines(run: RunDir) -> list[str]:
    file = run.rollouts / "rollouts.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _before(run: RunDir) -> dict[str, Any] | None:
    if not run.before.exists():
        return None
    found: dict[str, Any] = json.loads(run.before.read_text(encoding="utf-8"))
    return found


def _facts(
    setting: Setting, trainer: PPOTrainer, rollouts: Sequence[Mapping[str, Any]], seconds: float
) -> list[tuple[str, str]]:
    history = trainer.state.log_history
    spent = {name: sum(one.get(f"time/{name}", 0.0) for one in history) for name in ("generation", "rollout")}
    rolled = f"{len(rollouts)} of {trainer.plan.rollout} responses, {trainer.state.global_step} optimizer steps"
    rolling = f"rollouts {duration(spent['rollout'])} (generation {duration(spent['generation'])})"
    return [
        ("processes", str(trainer.args.world_size)),
        ("rollouts", rolled),
        ("time", f"{duration(seconds)}, of which training {duration(trainer.throughput.seconds)}, of which {rolling}"),
        ("model", str(setting.run.model)),
        ("log", str(setting.run.metrics)),
        ("samples", str(setting.run.rollouts)),
        ("page", str(setting.run.comparison)),
    ]


def curves(rollouts: Sequence[Mapping[str, Any]], kl_target: float | None = None) -> str:
    """Reward, KL, length and entropy over the rollouts, as SVG."""
    shown = (("objective/scores", "mean reward", None), ("objective/kl", "KL to the reference (nats)", kl_target),
             ("completions/mean_length", "length (tokens)", None),
             ("objective/entropy", "entropy (nats per token)", None))  # fmt: skip
    panels = [Panel(title, [(one["rollout"], one[name]) for one in rollouts], line) for name, title, line in shown]
    return panels_svg(panels, "rollout")


def _page(
    title: str, about: list[tuple[str, str]], sides: Sides, rollouts: Sequence[Mapping[str, Any]],
    kl_target: float | None, facts: list[tuple[str, str]],
) -> str:  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in ("held out", "before", "after", "change"))
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in sides.rows())
    body = [
        header(title, about),
        "<h2>Held-out prompts</h2>",
        f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>',
    ]
    body += ["<h2>Over the rollouts</h2>", curves(rollouts, kl_target)]
    body.append("<h2>Responses to held-out prompts</h2>")
    before = (sides.before or {}).get("samples", [])
    after = (sides.after or {}).get("samples", [])
    for number in range(max(len(before), len(after))):
        columns = [(name, side[number]) for name, side in (("before", before), ("after", after)) if number < len(side)]
        body.append(_card(number + 1, columns))
    return page(title, [*body, "<h2>The run</h2>", pairs(facts)])


def _card(number: int, columns: list[tuple[str, Mapping[str, Any]]]) -> str:
    prompt = formatted(columns[0][1]["prompt"])
    texts = "".join(
        f'<div class="answer"><span class="role">{name} · reward {one["score"]:.3f} · KL {one["kl"]:.2f}</span>'
        f"{formatted(one['response'])}</div>"
        for name, one in columns
    )
    return (
        f'<section class="card"><div class="head"><h3>Response {number}</h3></div><div class="prompt">{prompt}</div>'
        f'<div class="answers{" single" if len(columns) == 1 else ""}">{texts}</div></section>'
    )


def _show(title: str, sides: Sides, facts: list[tuple[str, str]], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tolerate_encoding(console)
    console.print()
    console.print(Text(title, "bold"))
    if sides.before or sides.after:
        table = Table(box=box.ROUNDED, header_style="bold")
        table.add_column("held out")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for number, row in enumerate(sides.rows()):
            table.add_row(*(Text(cell, "" if number else "bold") for cell in row))
        console.print(table)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value), soft_wrap=True)
