"""Held-out records that also stand in the training data, found before anything is tokenized."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sft_dist.config import DataSection
from sft_dist.data.account import Account
from sft_dist.data.conversations import conversations, read_records
from sft_dist.data.digests import digest
from sft_dist.data.formats import to_json
from sft_dist.data.pair_formats import PairReader, pair_to_json
from sft_dist.data.sources import Source

# Records of each side that are read; a look at more would take minutes.
MOST = 200_000


class Overlap(NamedTuple):
    """`pairs`: (where held out, where trained on), of the `held_out` records looked at.

    `most` records of each source were read; `whole`: those were all.
    """

    pairs: list[tuple[str, str]]
    held_out: int
    whole: bool
    most: int

    def line(self) -> str | None:
        """What to say of it, or None where no record stands on both sides."""
        of = f"{self.held_out:,} held-out records" + (
            "" if self.whole else f" (of the first {self.most:,} of each side)"
        )
        return overlap_line(self.pairs, of)


def overlap_line(pairs: Sequence[tuple[str, str]], of: str) -> str | None:
    """The line about held-out records that are trained on; None where there are none."""
    if not pairs:
        return None
    held_out, trained = pairs[0]
    stand = "stands" if len(pairs) == 1 else "stand"
    return (
        f"{len(pairs):,} of {of} also {stand} in the training data (first: {held_out} = {trained}), "
        "so that the measure flatters the model; remove them from one side"
    )


def overlap_of_sources(
    held_out: tuple[Source, DataSection], train: Sequence[tuple[Source, DataSection]], most: int = MOST,
    pairs: bool = False,
) -> Overlap:  # fmt: skip
    """Compare whole conversations, or `pairs`, `most` records of each source; records with faults are passed over."""
    ours: dict[bytes, str] = {}
    count = 0
    for key, where in _digests(*held_out, most, pairs):
        ours.setdefault(key, where)
        count += 1
    whole = count < most
    found: dict[str, str] = {}
    for source, data in train:
        read = 0
        for key, where in _digests(source, data, most, pairs):
            read += 1
            if key in ours:
                found.setdefault(ours[key], where)
        whole = whole and read < most
    return Overlap(list(found.items()), count, whole, most)


def _digests(source: Source, data: DataSection, most: int, pairs: bool) -> Iterator[tuple[bytes, str]]:
    tolerant = data.model_copy(update={"max_bad_records": 2**62})
    if pairs:
        for where, pair in itertools.islice(read_records(source, PairReader(tolerant), tolerant, Account()), most):
            yield digest(pair_to_json(pair)), where
        return
    for where, turns in itertools.islice(conversations(source, tolerant, Account()), most):
        yield digest(to_json(turns)), where
