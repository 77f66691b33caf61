"""Records of JSON, JSON lines, Parquet and CSV files, one after the other, each with its place in the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sft_dist.data.json_array import BrokenArray, elements
from sft_dist.errors import DataError

# Characters of a CSV field; the library's own limit of 131,072 is less than a long text has.
_LONGEST_FIELD = 2**31 - 1


class RawRecord(NamedTuple):
    """One record as it stands in its source: `fields`, or the `fault` that kept it from being read.

    `text`: a line of JSON that is not parsed yet; see :meth:`parsed`.
    """

    where: str
    fields: dict[str, Any] | None
    fault: str | None = None
    text: str | None = None

    def parsed(self) -> RawRecord:
        """The record with its fields, or with the fault of its JSON."""
        if self.text is None:
            return self
        try:
            return _raw(self.where, json.loads(self.text))
        except json.JSONDecodeError as error:
            return RawRecord(self.where, None, f"broken JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            return RawRecord(self.where, None, "broken JSON: nested too deeply")
        except ValueError as error:  # a number of thousands of digits
            return RawRecord(self.where, None, f"broken JSON: {error}")


def read_file(file: Path) -> Iterator[RawRecord]:
    """The records of a file of any kind. Raises :class:`DataError` where the file itself cannot be read on."""
    name = file.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(file)
        elif name.endswith(".csv"):
            yield from _read_csv(file)
        else:
            yield from _read_json(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file}: broken gzip: {error}; write it anew") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _open_text(file: Path) -> TextIO:
    if file.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(file, "rb"), encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


def _read_json(file: Path) -> Iterator[RawRecord]:
    """A JSON array of records, or one record a line, told apart by the first character."""
    with _open_text(file) as text:
        first = text.read(1)
        while first and first.isspace():
            first = text.read(1)
        text.seek(0)
        yield from _read_array(file, text) if first == "[" else _read_lines(file, text)


def _read_array(file: Path, text: TextIO) -> Iterator[RawRecord]:
    try:
        for number, row in enumerate(elements(text), 1):
            yield _raw(f"{file}: record {number}", row)
    except BrokenArray as error:
        raise DataError(f"{file}:{error.line}: broken JSON: {error.said} (column {error.column}); mend it") from error


def _read_lines(file: Path, text: TextIO) -> Iterator[RawRecord]:
    for number, line in enumerate(text, 1):
        if line and not line.isspace():
            yield RawRecord(f"{file}:{number}", None, None, line)


def _raw(where: str, row: Any) -> RawRecord:
    if isinstance(row, dict):
        return RawRecord(where, row)
    return RawRecord(where, None, f"a record must be an object with columns, got {type(row).__name__}")


def _read_csv(file: Path) -> Iterator[RawRecord]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                fields = {k: v for k, v in row.items() if k is not None}
                fault = f"{len(row[None])} fields too many" if None in row else None
                yield RawRecord(f"{file}: record {number}", None if fault else fields, fault)
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: broken CSV: {error}; mend it") from error


def _read_parquet(file: Path) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield RawRecord(f"{file}: record {number}", row)
    except pa.ArrowException as error:
        raise DataError(f"{file}: broken Parquet: {str(error).splitlines()[0]}; write it anew") from error
