"""`python -m sft_dist.compare`: several models on the same held-out prompts, scored by one reward model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist import builtin_models
from sft_dist.config import ModelSection, Recipe
from sft_dist.errors import UserError
from sft_dist.process import guarded
from sft_dist.recipe import load_recipe
from sft_dist.rundir import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft_dist.data.formats import Conversation
    from sft_dist.data.template import ChatTemplate
    from sft_dist.evaluation.contest import Drawing, Judge
    from sft_dist.render.contest import Asked, Contender, Contest


@dataclass(frozen=True)
class Candidate:
    """A model to compare, by the name that it has in the table."""

    name: str
    path: str


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.compare")
    parser.add_argument("recipe")
    parser.add_argument("reward")
    parser.add_argument("models", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)

    def work() -> None:
        from sft_dist.evaluation.contest import Drawing

        recipe = load_recipe(options.recipe, [])
        tokens = options.max_new_tokens or recipe.eval.max_new_tokens
        candidates = [Candidate(*word.split("=", 1)) for word in options.models]
        drawing = Drawing(options.temperature, tokens, options.seed)
        compare(recipe, options.reward, candidates, options.prompts, drawing, options.output)

    return guarded(work)


def compare(
    recipe: Recipe, reward: str, candidates: Sequence[Candidate], prompts: int, drawing: Drawing, output: Path | None
) -> Contest:  # fmt: skip
    """Have all models answer the first `prompts` held-out prompts of a recipe, and show what they come to.

    The first model is what the others are measured against. Into `output` go `comparison.html`, `comparison.json`
    and, a line a prompt, `samples.jsonl`. Raises :class:`UserError`.
    """
    from rich.console import Console

    from sft_dist.data.mixture_sources import title_of
    from sft_dist.evaluation.generation import as_messages
    from sft_dist.render.contest import Asked, Contest, to_html, to_terminal

    judge = _judge(reward, recipe)
    models = _Models(recipe, candidates)
    asked = models.prompts(prompts)
    turns = [prompt for prompt, _ in asked]
    told = [
        Asked(as_messages(prompt), answer, score)
        for (prompt, answer), score in zip(asked, judge.rewards(turns, [a for _, a in asked]), strict=True)
    ]
    contenders = tuple(models.contenders(turns, drawing, judge))
    facts = (("page", str(output / "comparison.html")), ("samples", str(output / "samples.jsonl"))) if output else ()
    contest = Contest(
        reward, title_of(recipe.data), drawing.temperature, drawing.max_new_tokens, tuple(told), contenders, facts
    )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(output / "comparison.html", to_html(contest))
        write_text(output / "comparison.json", json.dumps(_figures(contest), indent=2) + "\n")
        write_text(output / "samples.jsonl", "".join(_line(contest, i, one) for i, one in enumerate(told)))
    to_terminal(contest, Console(width=None if sys.stdout.isatty() else 120))
    return contest


def _judge(name: str, recipe: Recipe) -> Judge:
    from sft_dist.data.template import load_template
    from sft_dist.evaluation.contest import Judge
    from sft_dist.reward_model import load_reward_model

    model = load_reward_model(name)
    return Judge(model, load_template(model.tokenizer, recipe.data))


class _Models:
    """The models, one loaded after the other, the first of them kept beside the others."""

    def __init__(self, recipe: Recipe, candidates: Sequence[Candidate]) -> None:
        self.recipe, self.candidates = recipe, candidates
        self.places = [_place(recipe, candidate) for candidate in candidates]
        vocabulary = self.places[0].template.tokenizer.get_vocab()
        for candidate, place in zip(candidates[1:], self.places[1:], strict=True):
            if place.template.tokenizer.get_vocab() != vocabulary:
                raise UserError(
                    f"{candidate.path}: its vocabulary is not that of {candidates[0].path}, so that there is no KL "
                    "between the two; leave it out"
                )
        self.rows = self._held_out()

    def _held_out(self) -> Any:
        from sft_dist.data.prepare import prepare_test

        first = self.places[0]
        longest = first.limit if self.recipe.train.max_length is None else self.recipe.train.max_length
        held_out = prepare_test(self.recipe, first.template, longest)
        if held_out is None:
            raise UserError("data.dataset_test_split: the recipe holds nothing out; name another by --recipe")
        return held_out.rows

    def prompts(self, most: int) -> list[tuple[Conversation, str]]:
        """The first held-out prompts, each with the data's own answer."""
        from sft_dist.evaluation.generation import prompts_of

        found = prompts_of(self.rows, most)
        if not found:
            raise UserError("data.dataset_name: none of the held-out records has a prompt to answer; name another")
        return found

    def contenders(self, turns: Sequence[Conversation], drawing: Drawing, judge: Judge) -> Iterator[Contender]:
        """What each of the models comes to."""
        from sft_dist.evaluation.contest import contender

        first: PreTrainedModel | None = None
        for candidate, place in zip(self.candidates, self.places, strict=True):
            print(f"{candidate.name}: {len(turns)} prompts to answer", flush=True)
            model = place.load()
            yield contender(
                candidate.name, candidate.path, model, first, place.template, turns, self.rows, judge, drawing,
                place.limit or 1 << 20,
            )  # fmt: skip
            first = first or model


@dataclass(frozen=True)
class _Place:
    """Where a model lies, its template, and the positions that it has, None for no limit."""

    section: ModelSection
    template: ChatTemplate
    limit: int | None

    def load(self) -> PreTrainedModel:
        import torch

        from sft_dist.models import load_model

        model = load_model(self.section.model_name_or_path, self.section, self.template.tokenizer)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model


def _place(recipe: Recipe, candidate: Candidate) -> _Place:
    from sft_dist.data.template import load_template
    from sft_dist.data.tokenizer import load_tokenizer
    from sft_dist.models import load_config, row_length

    path = builtin_models.resolve(candidate.path)
    section = recipe.model.model_copy(update={"model_name_or_path": path, "model_revision": "main"})
    template = load_template(load_tokenizer(path, section), recipe.data)
    return _Place(section, template, row_length(load_config(path, section), None))


def _figures(contest: Contest) -> dict[str, Any]:
    import numpy as np

    from sft_dist.render.contest import standard_error

    return {
        "reward_model": contest.reward_model,
        "dataset": contest.dataset,
        "prompts": len(contest.asked),
        "temperature": contest.temperature,
        "max_new_tokens": contest.max_new_tokens,
        "data_reward": float(np.mean(contest.reference_rewards)),
        "models": {
            one.name: {
                "path": one.path,
                "reward": float(np.mean(one.rewards)),
                "reward_standard_error": standard_error(one.rewards),
                "kl": one.mean_kl,
                "tokens": one.mean_tokens,
                "ended": one.ended / len(one.samples),
                **{name: value for name, value in asdict(one.measure).items() if name in ("perplexity", "loss")},
            }
            for one in contest.contenders
        },
    }


def _line(contest: Contest, at: int, one: Asked) -> str:
    line = asdict(one) | {c.name: asdict(c.samples[at]) for c in contest.contenders}
    return json.dumps(line, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
