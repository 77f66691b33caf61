"""`python -m sft_dist.evaluation MODEL RECIPE ...`: the evaluation of a run, on any model directory."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.process import guarded
from sft_dist.recipe import load_recipe
from sft_dist.rundir import write_text

if TYPE_CHECKING:
    from sft_dist.data.formats import Conversation
    from sft_dist.data.template import ChatTemplate


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.evaluation")
    parser.add_argument("model")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)

    def work() -> None:
        recipe = load_recipe(options.recipe, [*options.overrides, f"model.model_name_or_path={options.model}"])
        evaluate(recipe, options.output)

    return guarded(work)


def evaluate(recipe: Recipe, output: Path | None) -> None:
    """Held-out perplexity and answers of the recipe's model, on one process; of pairs, those of the chosen sides.

    Writes `answers.jsonl`, `comparison.html` and `measure.json` into `output` where it is given.
    Raises :class:`UserError` when the recipe holds nothing out, or is of a reward model.
    """
    if recipe.stage == "reward":
        raise UserError("stage: a reward model gives no answers; run `sft-dist score MODEL FILE` on held-out pairs")
    import torch
    from rich.console import Console

    from sft_dist.data.mixture_sources import title_of
    from sft_dist.data.template import load_template
    from sft_dist.data.tokenizer import load_tokenizer
    from sft_dist.evaluation.generation import answer, as_messages
    from sft_dist.evaluation.perplexity import measure_rows
    from sft_dist.models import load_config, load_model, row_length
    from sft_dist.render.comparison import Answer, Comparison, to_html, to_terminal

    path = builtin_models.resolve(recipe.model.model_name_or_path)
    tokenizer = load_tokenizer(path, recipe.model)
    template = load_template(tokenizer, recipe.data)
    limit = row_length(load_config(path, recipe.model), recipe.train.max_length)
    rows, prompts = _held_out(recipe, template, limit)
    model = load_model(path, recipe.model, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batch = recipe.train.per_device_eval_batch_size
    found = measure_rows(model, rows, tokenizer.pad_token_id, batch, model.device)
    texts = answer(model, template, [turns for turns, _ in prompts], recipe.eval, limit or 1 << 20)
    comparison = Comparison(
        title=f"evaluation of {recipe.model.model_name_or_path}",
        model=recipe.model.model_name_or_path,
        dataset=title_of(recipe.data),
        before=None,
        after=found,
        answers=tuple(
            Answer(as_messages(turns), reference, None, text)
            for (turns, reference), text in zip(prompts, texts, strict=True)
        ),
        facts=(("answers", str(output / "comparison.html")),) if output else (),
    )
    if output:
        output.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = [json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in comparison.answers]
        write_text(output / "answers.jsonl", "".join(lines))
        write_text(output / "comparison.html", to_html(comparison))
        write_text(output / "measure.json", json.dumps(asdict(found), indent=2) + "\n")
    to_terminal(comparison, Console(width=None if sys.stdout.isatty() else 100))


def _held_out(recipe: Recipe, template: ChatTemplate, limit: int | None) -> tuple[Any, list[tuple[Conversation, str]]]:
    """The rows that a model is measured on, and what it is asked, each with the answer of the data."""
    from sft_dist.data.pairs import prepare_pairs
    from sft_dist.data.prepare import prepare
    from sft_dist.dpo.examination import chosen_rows, prompts_of_pairs
    from sft_dist.evaluation.generation import prompts_of

    pairs = recipe.stage == "dpo"
    _, held_out = (prepare_pairs if pairs else prepare)(recipe, template, limit)
    if held_out is None:
        raise UserError("data.dataset_test_split: the recipe holds nothing out; name a split or set test_split_size")
    prompts = (prompts_of_pairs if pairs else prompts_of)(held_out.rows, recipe.eval.num_prompts)
    return chosen_rows(held_out.rows) if pairs else held_out.rows, prompts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
