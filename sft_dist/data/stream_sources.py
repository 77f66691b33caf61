"""The sources of a stream, opened where a position says."""

from __future__ import annotations

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.data.feeds import Feed
from sft_dist.data.masking import Masker
from sft_dist.data.mixture import Draws, shares
from sft_dist.data.mixture_sources import key_of, sources_of
from sft_dist.data.sources import Source, open_source
from sft_dist.data.stream import Position
from sft_dist.data.template import load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.data.work import Work


def stream_sources(recipe: Recipe) -> list[Source]:
    """The sources that a recipe streams, in their order. Raises :class:`DataError`."""
    return [
        open_source(one, one.dataset_train_split, key_of(recipe.data, name))
        for name, one in sources_of(recipe.data).items()
    ]


def open_feeds(recipe: Recipe, limit: int | None, start: Position) -> tuple[list[Feed], Draws | None]:
    """The feeds of a recipe's sources and, of several, the choice among them. `limit`: tokens of the longest row.

    Texts become ids by `tokenizers` itself: blocks that have been trained on could not be made again.
    """
    tokenizer = load_tokenizer(
        builtin_models.resolve(recipe.model.model_name_or_path), recipe.model, lambda _: None
    )  # fmt: skip
    template = load_template(tokenizer, recipe.data)
    masker = Masker(tokenizer, limit, fast=False)
    parts = list(sources_of(recipe.data).values())
    places = start.sources or ((0, 0, 0),) * len(parts)
    feeds = [
        Feed(source, data, Work(data, template, masker), place)
        for source, data, place in zip(stream_sources(recipe), parts, places, strict=True)
    ]
    mixture = recipe.data.mixture
    if mixture is None:
        return feeds, None
    weights = shares([one.weight for one in mixture.values()], [None] * len(parts), recipe.data.mixture_temperature)
    return feeds, Draws(weights, start.draws)
