"""`python -m sft_dist.preview`: records as the model will see them, and a sample checked before a run.

With `--check` nothing is drawn: a sample of each split goes through format, template and mask, and one line
each tells what came of it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.conversations import conversations
from sft_dist.data.masking import IGNORE, Masker, Tokens
from sft_dist.data.prepare import test_split_of
from sft_dist.data.rows import nothing_left, tokenized
from sft_dist.data.sources import open_source
from sft_dist.data.template import ChatTemplate, load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import DataError
from sft_dist.models import load_config, row_length
from sft_dist.process import guarded
from sft_dist.recipe import load_recipe
from sft_dist.render.preview import PreviewRecord, PreviewSummary, TokenSpan, to_html, to_terminal
from sft_dist.rundir import write_text

SAMPLE = 256


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    options = _parser().parse_args(words)

    def work() -> None:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.check:
            check_sample(recipe)
        else:
            preview(recipe, options.records, options.split, options.html)

    return guarded(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft_dist.preview")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--records", type=int, default=3)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--check", action="store_true")
    return parser


def check_sample(recipe: Recipe) -> None:
    """Take the first records of each split through format, template and mask, and print what came of it.

    Raises :class:`DataError` for a bad record, and where nothing in a sample would be trained.
    """
    template, masker = _template(recipe)
    print(f"template: {template.origin}; a response ends with {template.closing or 'the eos token'!r}")
    for name in ("train", "test"):
        if name == "test" and test_split_of(recipe) is None:
            continue
        account = Account()
        rows = list(itertools.islice(_rows(recipe, name, template, masker, account), SAMPLE))
        if not rows:
            raise DataError(f"{_key(name)}: {nothing_left(account)}")
        share = account.trained_tokens / account.tokens
        print(
            f"{name}: the first {len(rows)} records are {account.format}, "
            f"{account.tokens / len(rows):.0f} tokens each, {share:.0%} trained, {account.truncated} truncated"
        )


def preview(recipe: Recipe, count: int, split: str, html: Path | None) -> None:
    """Show the first `count` rows of a split in the terminal and, where asked, as a page."""
    from rich.console import Console

    template, masker = _template(recipe)
    account = Account()
    rows = itertools.islice(_rows(recipe, split, template, masker, account), count)
    records = [_record(template, where, tokens, account.format) for where, tokens in rows]
    if not records:
        raise DataError(f"{_key(split)}: {nothing_left(account)}")
    summary = PreviewSummary(
        model=recipe.model.model_name_or_path,
        template=template.origin,
        dataset=f"{recipe.data.dataset_name} ({split})",
        records=len(records),
    )
    to_terminal(records, summary, Console(width=None if sys.stdout.isatty() else 100))
    if html is not None:
        write_text(html, to_html(records, summary))
        print(f"page: {html}")


def _key(split: str) -> str:
    return "data.dataset_name" if split == "train" else "data.dataset_test_split"


def _template(recipe: Recipe) -> tuple[ChatTemplate, Masker]:
    path = builtin_models.resolve(recipe.model.model_name_or_path)
    limit = row_length(load_config(path, recipe.model), recipe.train.max_length)
    tokenizer = load_tokenizer(path, recipe.model)
    return load_template(tokenizer, recipe.data), Masker(tokenizer, limit)


def _rows(
    recipe: Recipe, split: str, template: ChatTemplate, masker: Masker, account: Account
) -> Iterator[tuple[str, Tokens]]:
    name = test_split_of(recipe) if split == "test" else recipe.data.dataset_train_split
    if name is None:
        raise DataError("data.dataset_test_split: the recipe names no held-out split; preview the train split")
    source = open_source(recipe.data, name, _key(split))
    pairs = conversations(source, recipe.data, account, limit=SAMPLE)
    for where, _, tokens in tokenized(pairs, template, masker, recipe.data, account):
        yield where, tokens


def _record(template: ChatTemplate, where: str, row: Tokens, form: str) -> PreviewRecord:
    spans = []
    for trained, group in itertools.groupby(
        zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORE
    ):
        ids = [token for token, _ in group]
        text = template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append(TokenSpan(text, trained))
    return PreviewRecord(
        where=where,
        spans=tuple(spans),
        tokens=len(row.input_ids),
        trained_tokens=row.trained,
        truncated=row.truncated,
        format=form,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
