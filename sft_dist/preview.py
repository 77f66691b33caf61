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
from typing import NamedTuple

from sft_dist import builtin_models
from sft_dist.config import DataSection, Recipe
from sft_dist.data.account import Account
from sft_dist.data.conversations import conversations
from sft_dist.data.masking import IGNORE, Masker, Tokens
from sft_dist.data.mixture_sources import key_of, sources_of, title_of
from sft_dist.data.overlap import MOST, overlap_of_sources
from sft_dist.data.pair_formats import PAIR_STAGES
from sft_dist.data.pairs import PairTokens
from sft_dist.data.prompts import room_for_prompts
from sft_dist.data.rows import nothing_left, tokenized
from sft_dist.data.sources import open_source, test_split_of
from sft_dist.data.template import ChatTemplate, load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import DataError
from sft_dist.models import load_config, row_length
from sft_dist.preview_pairs import pair_previews, pair_rows
from sft_dist.preview_prompts import Shown, check_rewards, prompt_previews, prompt_rows
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
    if recipe.stage == "ppo":
        _check_prompts(recipe, template, masker.max_length)
        return
    pairs = recipe.stage in PAIR_STAGES
    print(f"template: {template.origin}; a response ends with {template.closing or 'the eos token'!r}")
    for part in [*_parts(recipe, "train"), *(_parts(recipe, "test") if test_split_of(recipe) else ())]:
        account = Account()
        made = (_pairs if pairs else _rows)(part, template, masker, account)
        rows = sum(1 for _ in itertools.islice(made, SAMPLE))
        if not rows:
            raise DataError(f"{part.key}: {nothing_left(account)}")
        share = account.trained_tokens / account.tokens
        cut = f"{account.too_long} left out as too long" if pairs else f"{account.truncated} truncated"
        print(
            f"{part.title}: the first {rows} records are {account.format}, "
            f"{account.tokens / rows:.0f} tokens each, {share:.0%} trained, {cut}"
        )
    if test_split_of(recipe):
        _check_overlap(recipe)


def _check_prompts(recipe: Recipe, template: ChatTemplate, limit: int | None) -> None:
    """The same for prompts, and the rewards of a recipe."""
    print(f"template: {template.origin}; a response ends with {template.closing or 'the eos token'!r}")
    room, shown = room_for_prompts(recipe, limit), []
    for part in [*_parts(recipe, "train"), *(_parts(recipe, "test") if test_split_of(recipe) else ())]:
        account = Account()
        rows = list(_prompts(part, template, room, account))
        if not rows:
            raise DataError(f"{part.key}: {nothing_left(account)}")
        shown += rows
        mean, longest = account.tokens / len(rows), max(len(row.ids) for row in rows)
        print(f"{part.title}: the first {len(rows)} prompts have {mean:.0f} tokens, at most {longest}")
    for line in check_rewards(recipe, template, builtin_models.resolve(recipe.model.model_name_or_path), shown):
        print(line)


def _check_overlap(recipe: Recipe) -> None:
    """Say which held-out records are trained on as well."""
    opened = {
        split: [(open_source(part.data, part.split, part.key), part.data) for part in _parts(recipe, split)]
        for split in ("train", "test")
    }
    most = SAMPLE if recipe.data.streaming else MOST
    line = overlap_of_sources(opened["test"][0], opened["train"], most, recipe.stage in PAIR_STAGES).line()
    print(f"test: {line}" if line else "test: no held-out record was found in the training data")


def preview(recipe: Recipe, count: int, split: str, html: Path | None) -> None:
    """Show the first `count` rows of a split, or both sides of so many pairs, and write a page where asked."""
    from rich.console import Console

    template, masker = _template(recipe)
    pairs = recipe.stage in PAIR_STAGES
    if recipe.stage == "ppo":
        room = room_for_prompts(recipe, masker.max_length)
        shown = [prompt_previews(_prompts(part, template, room, Account()), template) for part in _parts(recipe, split)]
    else:
        shown = [_records(part, template, masker, pairs) for part in _parts(recipe, split)]
    in_turn = (record for turn in itertools.zip_longest(*shown) for record in turn if record is not None)
    records = list(itertools.islice(in_turn, 2 * count if pairs else count))
    summary = PreviewSummary(
        model=recipe.model.model_name_or_path,
        template=template.origin,
        dataset=f"{title_of(recipe.data)} ({split})",
        records=len(records),
    )
    to_terminal(records, summary, Console(width=None if sys.stdout.isatty() else 100))
    if html is not None:
        write_text(html, to_html(records, summary))
        print(f"page: {html}")


class _Part(NamedTuple):
    """A split of one source. `title` names it for people, `key` is the recipe key that messages name."""

    data: DataSection
    split: str
    title: str
    key: str


def _parts(recipe: Recipe, split: str) -> list[_Part]:
    """What is trained on, a part for each source, or what is held out."""
    if split == "train":
        several = recipe.data.mixture is not None
        return [
            _Part(data, data.dataset_train_split, f"train {name}" if several else "train", key_of(recipe.data, name))
            for name, data in sources_of(recipe.data).items()
        ]
    name = test_split_of(recipe)
    if name is None:
        raise DataError("data.dataset_test_split: the recipe names no held-out split; preview the train split")
    return [_Part(recipe.data, name, "test", "data.dataset_test_split")]


def _records(part: _Part, template: ChatTemplate, masker: Masker, pairs: bool) -> Iterator[PreviewRecord]:
    """The first rows of a part. Raises :class:`DataError` where there is none."""
    account = Account()
    if pairs:
        yield from pair_previews(_pairs(part, template, masker, account), template)
    else:
        for where, tokens in _rows(part, template, masker, account):
            yield _record(template, where, tokens, account.format)
    if not account.rows:
        raise DataError(f"{part.key}: {nothing_left(account)}")


def _template(recipe: Recipe) -> tuple[ChatTemplate, Masker]:
    path = builtin_models.resolve(recipe.model.model_name_or_path)
    limit = row_length(load_config(path, recipe.model), recipe.train.max_length)
    tokenizer = load_tokenizer(path, recipe.model)
    return load_template(tokenizer, recipe.data), Masker(tokenizer, limit)


def _rows(part: _Part, template: ChatTemplate, masker: Masker, account: Account) -> Iterator[tuple[str, Tokens]]:
    source = open_source(part.data, part.split, part.key)
    pairs = conversations(source, part.data, account, limit=SAMPLE)
    for where, _, tokens in tokenized(pairs, template, masker, part.data, account):
        yield where, tokens


def _pairs(part: _Part, template: ChatTemplate, masker: Masker, account: Account) -> Iterator[tuple[str, PairTokens]]:
    return pair_rows(open_source(part.data, part.split, part.key), part.data, template, masker, account, SAMPLE)


def _prompts(part: _Part, template: ChatTemplate, room: int | None, account: Account) -> Iterator[Shown]:
    source = open_source(part.data, part.split, part.key)
    return prompt_rows(source, part.data, template, room, account, SAMPLE)


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
