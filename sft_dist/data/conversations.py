"""Records of a source as checked conversations, with the account of those that were left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sft_dist.config import DataSection
from sft_dist.data import formats
from sft_dist.data.formats import Conversation, Fault
from sft_dist.data.sources import RawRecord, Source
from sft_dist.errors import DataError


@dataclass
class Account:
    """What became of the records of one split. `bad` names each skipped record and its fault."""

    records: int = 0
    bad: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    truncated: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    format: str = ""

    def note_bad(self, line: str, most: int) -> None:
        """Count a bad record; :class:`DataError` when there are more than `most`."""
        self.bad.append(line)
        if len(self.bad) <= most:
            return
        if most == 0:
            raise DataError(f"{line}; mend it, or skip so many by data.max_bad_records")
        raise DataError(f"{line}; it is bad record number {len(self.bad)}, and data.max_bad_records is {most}")


def conversations(
    source: Source, data: DataSection, account: Account, limit: int | None = None
) -> Iterator[tuple[str, Conversation]]:
    """The good records of a source as (where, conversation), at most `limit` of them.

    A bad record is skipped while `data.max_bad_records` allows it and refused with a
    :class:`DataError` beyond that. The format is found at the first record that can be read.
    """
    hook = formats.load_hook(data.formatting) if data.formatting else None
    good = 0
    for raw in source.records():
        if limit is not None and good >= limit:
            return
        account.records += 1
        try:
            record = _fields(raw)
            if hook is not None:
                record = dict(formats.apply_hook(hook, record))
            if not account.format:
                account.format = formats.detect(record) if data.format == "auto" else data.format
            conversation = formats.parse(record, account.format)
        except Fault as fault:
            account.note_bad(f"{raw.where}: {fault}", data.max_bad_records)
            continue
        good += 1
        yield raw.where, conversation
    if account.records == 0:
        raise DataError(f"data.dataset_name: {source.name} holds no record; give data")


def _fields(raw: RawRecord) -> dict[str, object]:
    if raw.fields is None:
        raise Fault(raw.fault or "cannot be read")
    return raw.fields
