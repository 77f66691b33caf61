"""What becomes of rows that are too long, and of records whose responses are too short or too long."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import DataSection
from sft_dist.data.masking import Masked

Ints = NDArray[np.int64]


class Verdict(IntEnum):
    """What became of a record; the first that applies, in this order, behind `ROWS`."""

    ROWS = 0
    TOO_LONG = 1
    UNTRAINED = 2
    TOO_SHORT_RESPONSE = 3
    TOO_LONG_RESPONSE = 4


class Cut(NamedTuple):
    """Rows cut out of whole ones. Row i is `begins[i] : ends[i]` of record `record[i]`, with `trained[i]` tokens.

    Of the records: `verdicts`, uint8, and whether they were `truncated` or `split`. Rows are those of `ROWS` only.
    """

    begins: Ints
    ends: Ints
    record: Ints
    trained: Ints
    verdicts: NDArray[np.uint8]
    truncated: NDArray[np.bool_]
    split: NDArray[np.bool_]


def cut(rows: Masked, data: DataSection, max_length: int | None) -> Cut:
    """Apply `data.truncation_mode`, and the limits on trained tokens, to whole rows, one a record.

    Response limits count what is trained of a record after the cut. The first token of a row is not trained.
    """
    starts, stops = rows.starts[:-1], rows.starts[1:]
    long = stops - starts > (max_length or np.iinfo(np.int64).max)
    begins, ends, record = starts.copy(), stops.copy(), np.arange(len(starts))
    if max_length is not None and data.truncation_mode == "keep_start":
        ends = np.minimum(stops, starts + max_length)
    elif max_length is not None and data.truncation_mode == "keep_end":
        begins = np.maximum(starts, stops - max_length)
    elif max_length is not None and data.truncation_mode == "split" and long.any():
        begins, ends, record = _split(starts, stops, max_length)
    total = np.concatenate([[0], np.cumsum(rows.trained)])
    first = np.append(rows.trained, False)[begins] & (ends > begins)
    trained = total[ends] - total[begins] - first
    verdicts = _verdicts(np.bincount(record, trained, len(starts)).astype(np.int64), long, data)
    kept = verdicts[record] == Verdict.ROWS
    cuts = data.truncation_mode in ("keep_start", "keep_end")
    splits = data.truncation_mode == "split"
    return Cut(begins[kept], ends[kept], record[kept], trained[kept], verdicts, long & cuts, long & splits)


def _verdicts(trained: Ints, long: NDArray[np.bool_], data: DataSection) -> NDArray[np.uint8]:
    lowest, highest = data.min_response_length or 0, data.max_response_length or np.inf
    rules = (
        (long & (data.truncation_mode == "drop"), Verdict.TOO_LONG),
        (trained == 0, Verdict.UNTRAINED),
        (trained < lowest, Verdict.TOO_SHORT_RESPONSE),
        (trained > highest, Verdict.TOO_LONG_RESPONSE),
    )
    return np.select([rule for rule, _ in rules], [verdict for _, verdict in rules], Verdict.ROWS).astype(np.uint8)


def _split(starts: Ints, stops: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """Every token once, in rows of `length` and what is left.

    In a row of one token nothing would be trained, so that the row before it gives one up.
    """
    pieces = np.maximum(1, -(-(stops - starts) // length))
    record = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(len(record)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = starts[record] + number * length
    last = number == pieces[record] - 1
    lonely = last & (number > 0) & (stops[record] - begins == 1) & (length > 2)
    begins = begins - lonely
    ends = np.where(last, stops[record], np.append(begins[1:], 0))
    return begins, ends, record
