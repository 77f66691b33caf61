"""The training rows and the held-out rows of a recipe, of one source or of a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from sft_dist.config import Recipe
from sft_dist.data.account import Account
from sft_dist.data.mixture import Mixture, shares
from sft_dist.data.mixture_sources import key_of, sources_of
from sft_dist.data.rows import CONVERSATIONS, Kind, Prepared, rows_of
from sft_dist.data.sources import test_split_of
from sft_dist.data.template import ChatTemplate
from sft_dist.data.work import tokens_column
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TrainingRows(Prepared):
    """The rows of all sources, one source behind the other. `parts`: the account of each; `mixture`: of several."""

    parts: dict[str, Account] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def sources(self) -> dict[str, int]:
        """The first row of each source of a mixture by its name; empty where there is one source."""
        return {} if self.mixture is None else dict(zip(self.parts, self.mixture.borders, strict=True))


def prepare(
    recipe: Recipe, template: ChatTemplate, max_length: int | None, kind: Kind = CONVERSATIONS
) -> tuple[TrainingRows, Prepared | None]:
    """The training rows and the held-out rows, or None where the recipe holds nothing out."""
    data, size = recipe.data, recipe.data.test_split_size
    # What is held out is drawn of all records, before the first so many are taken.
    limit = None if size else data.max_train_records
    parts = {
        name: rows_of(one, template, max_length, one.dataset_train_split, key_of(data, name), limit, kind)
        for name, one in sources_of(data).items()
    }
    if not size:
        return _together(parts, recipe), prepare_test(recipe, template, max_length, kind)
    held = _held_of_each([len(part.rows) for part in parts.values()], size)
    halves = [_hold_out(part, count, recipe) for part, count in zip(parts.values(), held, strict=True)]
    train = {
        name: _first(half, data.max_train_records) for name, (half, _) in zip(parts, halves, strict=True)
    }  # fmt: skip
    return _together(train, recipe), _first(_joined([test for _, test in halves]), data.max_eval_records)


def prepare_test(
    recipe: Recipe, template: ChatTemplate, max_length: int | None, kind: Kind = CONVERSATIONS
) -> Prepared | None:
    """The rows of the split that is held out by name, or None where there is none."""
    split = test_split_of(recipe)
    if split is None:
        return None
    most = recipe.data.max_eval_records
    return rows_of(recipe.data, template, max_length, split, "data.dataset_test_split", most, kind)


def data_seed(recipe: Recipe) -> int:
    """The seed of everything that is drawn of the data."""
    return recipe.train.seed if recipe.train.data_seed is None else recipe.train.data_seed


def _together(parts: dict[str, Prepared], recipe: Recipe) -> TrainingRows:
    """The rows of all sources and, where there are several, their mixture. Raises :class:`DataError`."""
    whole, data = _joined(list(parts.values())), recipe.data
    accounts = {name: part.account for name, part in parts.items()}
    if data.mixture is None:
        return TrainingRows(whole.rows, whole.account, accounts)
    sizes = [len(part.rows) for part in parts.values()]
    try:
        weights = shares([source.weight for source in data.mixture.values()], sizes, data.mixture_temperature)
        mixture = Mixture(sizes, weights, data.stopping_strategy, data_seed(recipe))
    except ValueError as error:
        names = ", ".join(f"{number} is {name}" for number, name in enumerate(parts))
        raise DataError(f"data.mixture: {error} (source {names})") from error
    return TrainingRows(whole.rows, whole.account, accounts, mixture)


def _joined(parts: Sequence[Prepared]) -> Prepared:
    """Rows one part behind the other, with the sums of their accounts."""
    if len(parts) == 1:
        return parts[0]
    from datasets import concatenate_datasets

    rows = concatenate_datasets([part.rows for part in parts])
    return Prepared(rows, summed([part.account for part in parts]))


def summed(accounts: Sequence[Account]) -> Account:
    """The account of several sources together."""
    held = [asdict(account) for account in accounts]
    found = {}
    for name, value in held[0].items():
        if isinstance(value, int):
            found[name] = sum(one[name] for one in held)
        elif isinstance(value, list):
            found[name] = [line for one in held for line in one[name]]
        else:
            found[name] = ", ".join(dict.fromkeys(one[name] for one in held))
    return Account(**found)


def _recounted(part: Prepared, rows: Dataset) -> Prepared:
    """The same account over fewer rows."""
    trained, tokens = sum(rows["trained"]), sum(rows[tokens_column(rows.column_names)])
    account = Account(**{**asdict(part.account), "rows": len(rows), "tokens": tokens, "trained_tokens": trained})
    return Prepared(rows, account)


def _first(part: Prepared, most: int | None) -> Prepared:
    if most is None or most >= len(part.rows):
        return part
    return _recounted(part, part.rows.select(range(most)))


def _held_of_each(sizes: Sequence[int], size: float) -> list[int]:
    """Rows to hold out of each source: the share of each, or a number shared out in proportion.

    Raises :class:`DataError` where a source would be left with nothing on one side.
    """
    if size < 1:
        held = [round(size * rows) for rows in sizes]
    else:
        exact = [size * rows / sum(sizes) for rows in sizes]
        held = [int(share) for share in exact]
        for number in sorted(range(len(sizes)), key=lambda n: held[n] - exact[n])[: int(size) - sum(held)]:
            held[number] += 1
    for rows, count in zip(sizes, held, strict=True):
        if not 0 < count < rows:
            raise DataError(f"data.test_split_size: {size} of {sum(sizes)} rows leaves one side empty; change it")
    return held


def _hold_out(part: Prepared, count: int, recipe: Recipe) -> tuple[Prepared, Prepared]:
    """Hold out so many rows, drawn by the seed of the data."""
    halves = part.rows.train_test_split(test_size=count, seed=data_seed(recipe))
    return _recounted(part, halves["train"]), _recounted(part, halves["test"])
