"""What a policy is measured by before and after DPO: how it ranks held-out pairs, how far it has moved, its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sft_dist.data.formats import Conversation
from sft_dist.data.masking import IGNORE
from sft_dist.data.rows import turns_of
from sft_dist.evaluation.examination import Examination, Result
from sft_dist.render.comparison import Figure, Measure

# Name of the measure, how it is called, and which way is better.
_LEAD = "rewards/accuracies"
_SHOWN: tuple[tuple[str, str, Literal["higher", "lower"] | None], ...] = (
    (_LEAD, "share of pairs ranked right", "higher"),
    ("loss", "DPO loss", "lower"),
    ("rewards/margins", "reward margin", "higher"),
    ("rewards/chosen", "reward of the chosen", None),
    ("rewards/rejected", "reward of the rejected", None),
    ("kl", "KL to the reference, nats a token", None),
    ("kl_k2", "KL by k2, nats a token", None),
    ("nll", "loss on the chosen, nats a token", None),
)
_NAMES = tuple(name for name, _, _ in _SHOWN)


class PairExamination(Examination):
    """Measures on held-out pairs; perplexity and loss are those of the chosen responses."""

    curve_unit = "DPO loss"

    def prompts_of(self, rows: Any, most: int) -> list[tuple[Conversation, str]]:
        """As :func:`prompts_of_pairs`."""
        return prompts_of_pairs(rows, most)

    def result(self, found: Mapping[str, float], answers: list[str]) -> Result:
        """As the base class."""
        measure = Measure(found["perplexity"], found["nll"], int(found["tokens"]), int(found["records"]))
        return Result(measure, answers, {name: found[name] for name in _NAMES if name in found})

    def figures(self, first: Result | None, last: Result | None) -> tuple[Figure, ...]:
        """As the base class."""
        return tuple(figure for name, figure in self._shown(first, last).items() if name != _LEAD)

    def lead(self, first: Result | None, last: Result | None) -> Figure | None:
        """As the base class."""
        return self._shown(first, last).get(_LEAD)

    @staticmethod
    def _shown(first: Result | None, last: Result | None) -> dict[str, Figure]:
        both = [result.figures if result is not None else {} for result in (first, last)]
        return {
            name: Figure(title, both[0].get(name), both[1].get(name), better)
            for name, title, better in _SHOWN
            if name in both[0] or name in both[1]
        }


def prompts_of_pairs(rows: Any, most: int) -> list[tuple[Conversation, str]]:
    """The first `most` prompts of prepared pairs that are no plain text, each with the chosen answer."""
    prompts: list[tuple[Conversation, str]] = []
    for row in rows:
        if len(prompts) >= most:
            break
        turns = turns_of(row)
        if turns[0].role != "text":
            prompts.append((turns, row["chosen"]))
    return prompts


def chosen_rows(rows: Any) -> list[dict[str, list[int]]]:
    """The chosen sides of prepared pairs as rows of a language model, which are trained in their responses."""
    return [
        {"input_ids": [*row["prompt_ids"], *row["chosen_ids"]],
         "labels": [*[IGNORE] * len(row["prompt_ids"]), *row["chosen_ids"]]}
        for row in rows
    ]  # fmt: skip
