"""The fields of a record as it was read, before its format is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sft_dist.config import DataSection
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Fault, apply_hook, load_hook


class Fields:
    """Gives the fields of raw records, by the recipe's own function where it names one.

    Raises :class:`DataError` where that cannot be loaded.
    """

    def __init__(self, data: DataSection) -> None:
        self._hook: Callable[[dict[str, Any]], Mapping[str, Any]] | None = (
            load_hook(data.formatting) if data.formatting else None
        )

    def __call__(self, raw: RawRecord) -> Mapping[str, Any]:
        """The fields of a record. Raises :class:`Fault`."""
        if raw.fields is None:
            raise Fault(raw.fault or "cannot be read")
        record: Mapping[str, Any] = raw.fields
        return record if self._hook is None else dict(apply_hook(self._hook, dict(record)))
