"""The sources that a recipe trains on, each as a data section of its own. This module is free of torch."""

from __future__ import annotations

from sft_dist.config import DataSection

_ONE_SOURCE = "data.dataset_name"
_OF_THE_MIXTURE = ("mixture", "mixture_temperature", "stopping_strategy")


def sources_of(data: DataSection) -> dict[str, DataSection]:
    """The section of each source, as if it were the only one, by its name in the mixture and in its order.

    Without a mixture there is one, under the name of the data set.
    """
    if data.mixture is None:
        return {data.dataset_name: data}
    alone = {key: DataSection.model_fields[key].get_default() for key in _OF_THE_MIXTURE}
    return {
        # All keys of a source but its weight are keys of the section too.
        name: data.model_copy(update={**alone, **source.model_dump(exclude={"weight"})})
        for name, source in data.mixture.items()
    }


def key_of(data: DataSection, name: str) -> str:
    """The recipe key that names the data set of a source of :func:`sources_of`, for messages."""
    return _ONE_SOURCE if data.mixture is None else f"data.mixture.{name}.dataset_name"


def title_of(data: DataSection) -> str:
    """What is trained on, for people: the name of the data set, or those of the sources as `chat + docs`."""
    return data.dataset_name if data.mixture is None else " + ".join(data.mixture)
