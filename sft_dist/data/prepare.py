"""The training rows and the held-out rows of a recipe."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.rows import Prepared, rows_of
from sft_dist.data.template import ChatTemplate
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def prepare(recipe: Recipe, template: ChatTemplate, max_length: int | None) -> tuple[Prepared, Prepared | None]:
    """The training rows and the held-out rows, or None where the recipe holds nothing out."""
    data = recipe.data
    if data.test_split_size:
        every = rows_of(recipe.data, template, max_length, data.dataset_train_split, "data.dataset_name", None)
        train, test = _hold_out(every, data.test_split_size, recipe)
        return _first(train, data.max_train_records), _first(test, data.max_eval_records)
    train = rows_of(
        recipe.data, template, max_length, data.dataset_train_split, "data.dataset_name", data.max_train_records
    )
    return train, prepare_test(recipe, template, max_length)


def prepare_test(recipe: Recipe, template: ChatTemplate, max_length: int | None) -> Prepared | None:
    """The rows of the split that is held out by name, or None where there is none."""
    split = test_split_of(recipe)
    if split is None:
        return None
    return rows_of(recipe.data, template, max_length, split, "data.dataset_test_split", recipe.data.max_eval_records)


def test_split_of(recipe: Recipe) -> str | None:
    """The held-out split: the recipe's, or the one that the built-in data set comes with."""
    data = recipe.data
    if data.dataset_test_split is None and data.dataset_name == "python-docs" and not data.test_split_size:
        return "test"
    return data.dataset_test_split


def _recounted(part: Prepared, rows: Dataset) -> Prepared:
    """The same account over fewer rows."""
    trained, tokens = sum(rows["trained"]), sum(rows["length"])
    account = Account(**{**asdict(part.account), "rows": len(rows), "tokens": tokens, "trained_tokens": trained})
    return Prepared(rows, account)


def _first(part: Prepared, most: int | None) -> Prepared:
    if most is None or most >= len(part.rows):
        return part
    return _recounted(part, part.rows.select(range(most)))


def _hold_out(part: Prepared, size: float, recipe: Recipe) -> tuple[Prepared, Prepared]:
    """Hold out a share or a number of the rows, drawn by the seed of the data."""
    seed = recipe.train.seed if recipe.train.data_seed is None else recipe.train.data_seed
    held = round(size * len(part.rows)) if size < 1 else int(size)
    if not 0 < held < len(part.rows):
        raise DataError(f"data.test_split_size: {size} of {len(part.rows)} rows leaves one side empty; change it")
    halves = part.rows.train_test_split(test_size=held, seed=seed)
    return _recounted(part, halves["train"]), _recounted(part, halves["test"])
