"""What a record asks a reward model: the tokens of a conversation, or those of both sides of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.data import formats
from sft_dist.data.account import one_line
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Conversation, Fault
from sft_dist.data.masking import Masker
from sft_dist.data.pair_formats import PREFERENCE, Pair, is_pair, parse_pair
from sft_dist.data.pairs import Ids, answered, pair_tokens
from sft_dist.data.template import ChatTemplate


@dataclass(frozen=True)
class Asked:
    """A record as the rows of tokens that get rewards: one, or those of chosen and rejected; or its fault."""

    where: str
    rows: tuple[Ids, ...] = ()
    fault: str | None = None


class Asker:
    """Turns raw records into rows of tokens.

    `form`: the format of all records, empty to find that of each by its columns. `formatting`: the path of a function
    that turns a raw record into one of the formats. `limit`: tokens that the model reads, None for no limit; a longer
    record is a fault, for a reward for a part of it would be one for something else.
    """

    def __init__(
        self, template: ChatTemplate, limit: int | None, form: str = "", formatting: str | None = None
    ) -> None:
        self.template, self.limit, self.form = template, limit, form
        self.masker = Masker(template.tokenizer, None)
        self._hook: Callable[[dict[str, Any]], Mapping[str, Any]] | None = (
            formats.load_hook(formatting) if formatting else None
        )

    def __call__(self, batch: Sequence[RawRecord]) -> list[Asked]:
        """The records of a batch, in their order."""
        read = [self._read(raw) for raw in batch]
        found: list[tuple[Ids, ...] | Fault] = [one if isinstance(one, Fault) else () for one in read]
        pairs = [(place, one) for place, one in enumerate(read) if isinstance(one, Pair)]
        for (place, _), both in zip(pairs, pair_tokens([p for _, p in pairs], self.template, self.masker), strict=True):
            found[place] = both if isinstance(both, Fault) else both.sides
        alone = [(place, one) for place, one in enumerate(read) if isinstance(one, tuple)]
        for (place, _), side in zip(alone, answered([c for _, c in alone], self.template, self.masker), strict=True):
            found[place] = side if isinstance(side, Fault) else (side[0],)
        return [self._asked(raw.where, one) for raw, one in zip(batch, found, strict=True)]

    def _read(self, raw: RawRecord) -> Pair | Conversation | Fault:
        parsed = raw.parsed()
        try:
            if parsed.fields is None:
                raise Fault(parsed.fault or "cannot be read")
            record: Mapping[str, Any] = parsed.fields
            if self._hook is not None:
                record = dict(formats.apply_hook(self._hook, dict(record)))
            if self.form == PREFERENCE or (not self.form and is_pair(record)):
                return parse_pair(record)
            return formats.parse(record, self.form or formats.detect(record))
        except Fault as fault:
            return fault

    def _asked(self, where: str, found: tuple[Ids, ...] | Fault) -> Asked:
        if isinstance(found, Fault):
            return Asked(where, fault=one_line(str(found)))
        longest = max(map(len, found))
        if self.limit is not None and longest > self.limit:
            return Asked(where, fault=f"{longest} tokens, and the model reads {self.limit}; shorten it")
        return Asked(where, found)
