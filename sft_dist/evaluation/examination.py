"""The same measure before and after training, and the report that sets them side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.formats import Conversation
from sft_dist.data.mixture_sources import title_of
from sft_dist.data.rows import Prepared
from sft_dist.data.template import ChatTemplate
from sft_dist.evaluation.facts import curve_of, facts_of, summary_of
from sft_dist.evaluation.generation import answer, as_messages, prompts_of
from sft_dist.render.comparison import Answer, Comparison, Figure, Measure, to_html, to_terminal
from sft_dist.render.wording import count
from sft_dist.rundir import RunDir, write_text

if TYPE_CHECKING:
    from sft_dist.trainers.ordered import Ordered


@dataclass(frozen=True)
class Result:
    """Held-out loss and the answers to the held-out prompts, in their order.

    `figures`: what else the stage measures, by name.
    """

    measure: Measure
    answers: list[str]
    figures: dict[str, float] = field(default_factory=dict)


class Examination:
    """Measures the model of a trainer; all ranks take part and all get the result.

    `limit`: positions the model has, None for no limit. `curve_unit`: what the loss of a step is.
    """

    curve_unit = "loss (nats per token)"

    def __init__(
        self,
        trainer: Ordered,
        recipe: Recipe,
        template: ChatTemplate,
        held_out: Prepared | None,
        limit: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.settings = recipe.eval
        self.template = template
        self.held_out = held_out
        self.limit = limit or 1 << 20
        self.say = say
        self.prompts = self.prompts_of(held_out.rows, recipe.eval.num_prompts) if held_out is not None else []

    def prompts_of(self, rows: Any, most: int) -> list[tuple[Conversation, str]]:
        """What is asked, each with the answer of the data."""
        return prompts_of(rows, most)

    def figures(self, first: Result | None, last: Result | None) -> tuple[Figure, ...]:
        """What the report sets side by side beside perplexity and loss."""
        return ()

    def lead(self, first: Result | None, last: Result | None) -> Figure | None:
        """What stands first in the report, where it is not perplexity."""
        return None

    def result(self, found: Mapping[str, float], answers: list[str]) -> Result:
        """The result of an evaluation's numbers, which have their plain names."""
        measure = Measure(found["perplexity"], found["loss"], int(found["tokens"]), int(found["records"]))
        return Result(measure, answers)

    def take(self, when: str) -> Result | None:
        """The result, or None where the recipe holds nothing out. `when` names it in the trackers."""
        if self.held_out is None:
            return None
        records = count(len(self.held_out.rows), "held-out record")
        self.say(f"measuring {when} training: {records}, {count(len(self.prompts), 'prompt')} to answer")
        found = self.trainer.evaluate(metric_key_prefix=when)
        plain = {name.removeprefix(f"{when}_"): value for name, value in found.items()}
        return self.result(plain, self._answers())

    def _answers(self) -> list[str]:
        from accelerate.utils import gather_object

        accelerator = self.trainer.accelerator
        if self.trainer.backend.shards_weights:
            # A layer's weights are gathered by all processes together: all answer all prompts.
            prompts = [prompt for prompt, _ in self.prompts]
            return answer(self.trainer.model, self.template, prompts, self.settings, self.limit, together=True)
        model = accelerator.unwrap_model(self.trainer.model)
        rank, size = accelerator.process_index, accelerator.num_processes
        numbers = range(rank, len(self.prompts), size)
        mine = answer(model, self.template, [self.prompts[i][0] for i in numbers], self.settings, self.limit)
        every = gather_object(list(zip(numbers, mine, strict=True)))
        return [text for _, text in sorted(every)]


def before(run: RunDir) -> Result | None:
    """The result that was taken before training, or None."""
    if not run.before.exists():
        return None
    held = json.loads(run.before.read_text(encoding="utf-8"))
    return Result(Measure(**held["measure"]), held["answers"], held.get("figures", {}))


def report(
    recipe: Recipe,
    run: RunDir,
    examination: Examination,
    train: Account,
    after: Result | None,
    seconds: float,
) -> None:
    """Write summary, answers and the page that compares them, and show the table. `seconds`: of the whole run."""
    from rich.console import Console

    trainer, held_out = examination.trainer, examination.held_out
    first = before(run) if recipe.eval.enabled else None
    comparison = _comparison(recipe, run, examination, first, after, seconds)
    summary = summary_of(
        trainer, train, held_out, first and first.measure, after and after.measure, seconds,
        packing=getattr(trainer, "packing", None),
    )  # fmt: skip
    for when, result in (("before", first), ("after", after)):
        if result is not None:
            summary[when] |= result.figures
    write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    if after is not None:
        lines = [json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in comparison.answers]
        write_text(run.answers, "".join(lines))
        write_text(run.comparison, to_html(comparison))
    to_terminal(comparison, Console(width=None if sys.stdout.isatty() else 100))


def _comparison(
    recipe: Recipe,
    run: RunDir,
    examination: Examination,
    first: Result | None,
    last: Result | None,
    seconds: float,
) -> Comparison:
    trainer = examination.trainer
    prompts = examination.prompts if first or last else []
    nothing = [None] * len(prompts)
    facts = facts_of(trainer, run, seconds)
    if last is not None:
        facts.append(("answers", str(run.comparison)))
    return Comparison(
        title=recipe.train.run_name or run.root.name,
        model=recipe.model.model_name_or_path,
        dataset=title_of(recipe.data),
        before=first.measure if first else None,
        after=last.measure if last else None,
        answers=tuple(
            Answer(as_messages(prompt), reference, a, b)
            for (prompt, reference), a, b in zip(
                prompts, first.answers if first else nothing, last.answers if last else nothing, strict=True
            )
        ),
        facts=tuple(facts),
        curve=curve_of(trainer),
        curve_unit=examination.curve_unit,
        figures=examination.figures(first, last),
        lead=examination.lead(first, last),
    )
