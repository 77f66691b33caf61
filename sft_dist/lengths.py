"""`python -m sft_dist.lengths`: how long the rows of a recipe's data are, as figures and a histogram."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.data.account import Account, dropped
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.mixture_sources import title_of
from sft_dist.data.packing import Ints
from sft_dist.data.pair_formats import PAIR_STAGES, SIDES
from sft_dist.data.pairs import PAIRS
from sft_dist.data.prepare import TrainingRows, data_seed, prepare
from sft_dist.data.rows import CONVERSATIONS, Prepared
from sft_dist.data.template import load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import DataError, UserError
from sft_dist.models import load_config, row_length
from sft_dist.packing_choice import packed_length, packed_line
from sft_dist.process import guarded
from sft_dist.recipe import load_recipe
from sft_dist.render.lengths import LengthReport, Source, to_svg, to_terminal
from sft_dist.render.wording import count, share
from sft_dist.rundir import write_text

if TYPE_CHECKING:
    import datasets


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.lengths")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--image", type=Path)
    options = parser.parse_args(words)
    return guarded(lambda: show(load_recipe(options.recipe, options.overrides), options.split, options.image))


def show(recipe: Recipe, split: str, image: Path | None) -> None:
    """Print the report of a split and, where asked, write it as an SVG picture.

    Raises :class:`UserError` for a stream, which is not counted beforehand, and for a split that there is not.
    """
    from rich.console import Console

    report = report_of(recipe, split)
    to_terminal(report, Console(width=None if sys.stdout.isatty() else 80))
    if image is not None:
        write_text(image, to_svg(report))
        print(f"picture: {image}")


def report_of(recipe: Recipe, split: str) -> LengthReport:
    """The report of a split's prepared rows, which are made if no run has made them yet."""
    if recipe.data.streaming:
        raise UserError("data.streaming: a stream is not read to its end beforehand; add data.streaming=false")
    path = builtin_models.resolve(recipe.model.model_name_or_path)
    limit = row_length(load_config(path, recipe.model), recipe.train.max_length)
    template = load_template(load_tokenizer(path, recipe.model), recipe.data)
    kind = PAIRS if recipe.stage in PAIR_STAGES else CONVERSATIONS
    part = dict(zip(("train", "test"), prepare(recipe, template, limit, kind), strict=True))[split]
    if part is None:
        raise DataError("data.dataset_test_split: the recipe names no held-out split")
    tokens, trained = counted(part.rows)
    facts = _facts(recipe, part)
    if recipe.data.packing and split == "train":
        capacity = packed_length(recipe.data.packing, limit)
        mixture = part.mixture if isinstance(part, TrainingRows) else None
        facts.append(("packed", packed_line(Arrangement(tokens, capacity, data_seed(recipe), mixture))))
    data = f"{title_of(recipe.data)} ({split})"
    return LengthReport.of(tokens, trained, Source(recipe.model.model_name_or_path, data, limit, tuple(facts)))


def counted(rows: datasets.Dataset) -> tuple[Ints, Ints]:
    """Tokens and trained tokens of each prepared row, (rows,) each; of pairs, of each side."""
    if "chosen_ids" in rows.column_names:
        prompt, chosen, rejected = (_list_lengths(rows, f"{part}_ids") for part in ("prompt", *SIDES))
        return np.concatenate([prompt + chosen, prompt + rejected]), np.concatenate([chosen, rejected])
    return document_lengths(rows), np.asarray(rows.with_format("numpy")["trained"][:], dtype=np.int64)


def _list_lengths(rows: datasets.Dataset, column: str) -> Ints:
    table = rows.select_columns([column]).with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table[column]).to_numpy(), dtype=np.int64)


def _facts(recipe: Recipe, part: Prepared) -> list[tuple[str, str]]:
    account: Account = part.account
    told = [f"{len(part.rows):,}"]
    # A split that is drawn has the account of all records that it was drawn from.
    drawn = " before the split was drawn" if recipe.data.test_split_size else ""
    if account.truncated:
        told.append(f"{account.truncated:,} cut to the limit{drawn}")
    facts = [("rows", ", ".join(told))]
    if left := dropped(account):
        facts.append(("left out", f"of {account.records:,} records{drawn}: {', '.join(left)}"))
    facts.append(("trained", f"{share(account.trained_tokens, account.tokens)} of {count(account.tokens, 'token')}"))
    return facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
