"""Records of a source as checked conversations, with the account of those that were left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from sft_dist.config import DataSection
from sft_dist.data import formats
from sft_dist.data.account import Account
from sft_dist.data.fields import Fields
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Conversation, Fault
from sft_dist.data.sources import Source
from sft_dist.errors import DataError

Parsed = TypeVar("Parsed", covariant=True)


class ReadsRecords(Protocol[Parsed]):
    """Turns raw records into what rows are made of; `form` is their format, as far as it is known."""

    form: str

    def __call__(self, raw: RawRecord) -> Parsed:
        """What a record is. Raises :class:`Fault`."""


class Reader:
    """Turns raw records into conversations. `form`: the format, found at the first record that can be read.

    Raises :class:`DataError` where the recipe's own function cannot be loaded.
    """

    def __init__(self, data: DataSection, form: str = "") -> None:
        self.form = form or ("" if data.format == "auto" else data.format)
        self._fields = Fields(data)

    def __call__(self, raw: RawRecord) -> Conversation:
        """The conversation of a record. Raises :class:`Fault`."""
        record = self._fields(raw)
        if not self.form:
            self.form = formats.detect(record)
        return formats.parse(record, self.form)


def conversations(
    source: Source, data: DataSection, account: Account, limit: int | None = None
) -> Iterator[tuple[str, Conversation]]:
    """The good records of a source as (where, conversation), at most `limit` of them.

    A bad record is skipped while `data.max_bad_records` allows it and refused with a
    :class:`DataError` beyond that. The format is found at the first record that can be read.
    """
    return read_records(source, Reader(data, account.format), data, account, limit)


def read_records(
    source: Source, reader: ReadsRecords[Parsed], data: DataSection, account: Account, limit: int | None = None
) -> Iterator[tuple[str, Parsed]]:
    """The good records of a source as (where, what the reader made of it), as `conversations` gives them."""
    good = 0
    for raw in source.records():
        if limit is not None and good >= limit:
            return
        account.records += 1
        try:
            found = reader(raw)
        except Fault as fault:
            account.note_bad(f"{raw.where}: {fault}", data.max_bad_records)
            continue
        account.format = reader.form
        good += 1
        yield raw.where, found
    if account.records == 0:
        raise no_record(source)


def no_record(source: Source) -> DataError:
    """The refusal of a source without any record."""
    return DataError(f"data.dataset_name: {source.name} holds no record; give data")
