"""Raw records to rows, batch by batch: what a process does, and how the batches are put together again.

`Work` depends on its batch alone, so that any process may do it. What depends on the records before is the work of
`Merger`: the order of faults and their limit, equal records, and the account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_dist.config import DataSection
from sft_dist.data.account import Account, one_line
from sft_dist.data.conversations import Parsed, Reader, ReadsRecords
from sft_dist.data.digests import Seen, digest, new_among
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Conversation, Fault, Turn, to_json
from sft_dist.data.lengths import Cut, Verdict, cut
from sft_dist.data.masking import IGNORE, Masked, Masker
from sft_dist.data.template import ChatTemplate, Rendered
from sft_dist.errors import DataError

_INTS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {"input_ids": _INTS, "labels": _INTS, "where": pa.string(), "turns": pa.string(), "digest": pa.binary(),
     "length": pa.int32(), "trained": pa.int32()}
)  # fmt: skip


@dataclass
class Block:
    """What came of a batch: `rows` with the columns of `SCHEMA`, and what became of its records.

    `records` were read, and `good` of them are conversations. `faults` are (place in the batch, line), in order;
    `refusal` is what ends the preparation at a place. The arrays are about the records that could be rendered:
    their digests, verdicts, and whether they were cut. `record` says which of them a row was made of.
    """

    records: int = 0
    good: int = 0
    form: str = ""
    faults: list[tuple[int, str]] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    digests: list[bytes] = field(default_factory=list)
    wheres: dict[int, str] = field(default_factory=dict)  # of the untrained
    verdicts: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    truncated: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    split: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    record: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: pa.RecordBatch | None = None

    def note(self, place: int, where: str, fault: Fault) -> None:
        """Take in the fault of a record."""
        self.faults.append((place, one_line(f"{where}: {fault}")))


def read_batch(
    batch: Sequence[RawRecord], reader: ReadsRecords[Parsed], limit: int | None = None
) -> tuple[Block, list[tuple[int, str, Parsed]]]:
    """The records of a batch as (place, where, what was read), and a block that holds the faults of the others.

    With `limit`, the batch ends behind so many good records.
    """
    block = Block()
    good: list[tuple[int, str, Parsed]] = []
    for place, raw in enumerate(batch):
        if limit is not None and len(good) >= limit:
            break
        block.records += 1
        try:
            good.append((place, raw.where, reader(raw.parsed())))
        except Fault as fault:
            block.note(place, raw.where, fault)
    block.form, block.good = reader.form, len(good)
    return block, good


class MakesBlocks(Protocol):
    """What makes blocks of batches, in any process: see :class:`Work`, which does of conversations."""

    def __call__(self, batch: Sequence[RawRecord], form: str, limit: int | None = None) -> Block: ...


Good = tuple[int, str, Conversation]  # place in the batch, where, and the conversation


class Work:
    """Makes blocks of batches of raw records. Raises :class:`EncoderDiffers` as the masker does."""

    def __init__(self, data: DataSection, template: ChatTemplate, masker: Masker) -> None:
        self.data, self.template, self.masker = data, template, masker

    def __call__(self, batch: Sequence[RawRecord], form: str, limit: int | None = None) -> Block:
        """The block of a batch. `form`: the format, empty where it is still to be found.

        With `limit`, the batch ends behind so many conversations.
        """
        return self.finish(*read_batch(batch, Reader(self.data, form), limit))

    def finish(self, block: Block, good: Sequence[Good]) -> Block:
        """Add the rows of good conversations to a block that has its format."""
        block.good = len(good)
        shown: list[Good] = []
        rendered: list[Rendered] = []
        for one, found in zip(good, self.template.render_all([turns for _, _, turns in good]), strict=True):
            if isinstance(found, Fault):
                block.note(*one[:2], found)
            else:
                shown.append(one)
                rendered.append(found)
        block.faults.sort()
        raw = block.form == "text"
        whole = self.masker.whole(rendered, raw)
        if self.data.truncation_mode == "split" and not raw:
            block.refusal = self._refusal(whole, shown)
        parts = cut(whole, self.data, self.masker.max_length)
        block.verdicts, block.truncated, block.split = parts.verdicts, parts.truncated, parts.split
        block.wheres = {int(i): shown[i][1] for i in np.flatnonzero(parts.verdicts == Verdict.UNTRAINED)}
        block.record = parts.record
        texts = [to_json(turns) for _, _, turns in shown]
        block.digests = [digest(text) for text in texts]
        block.rows = self._table(whole, parts, [where for _, where, _ in shown], texts, block.digests)
        return block

    def _refusal(self, whole: Masked, shown: Sequence[Good]) -> tuple[int, str] | None:
        longest, lengths = self.masker.max_length, np.diff(whole.starts)
        if longest is None or not (lengths > longest).any():
            return None
        first = int(np.argmax(lengths > longest))
        place, where, _ = shown[first]
        return place, (
            f"data.truncation_mode: {where}: a conversation of {lengths[first]} tokens, which is more than {longest}, "
            "cannot be split; raise train.max_length, or choose keep_start, keep_end or drop"
        )

    def _table(
        self, whole: Masked, parts: Cut, wheres: Sequence[str], texts: Sequence[str], digests: Sequence[bytes]
    ) -> pa.RecordBatch:
        record = parts.record.tolist()
        cuts = [slice(*pair) for pair in zip(parts.begins.tolist(), parts.ends.tolist(), strict=True)]
        lengths = parts.ends - parts.begins
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.concatenate([np.zeros(0, np.int32), *(whole.ids[c] for c in cuts)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(whole.trained[c] for c in cuts)])
        labels = np.where(trained, ids, np.int32(IGNORE))
        # The first token of a row is predicted by nothing: counting it would skew the mean.
        labels[offsets[:-1]] = IGNORE
        turns = [texts[i] for i in record]
        for row in np.flatnonzero(parts.split[parts.record]).tolist():
            turns[row] = self._part(whole.ids[cuts[row]])
        lists = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for values in (ids, labels)]
        columns = [
            pa.array([printable(wheres[i]) for i in record], pa.string()),
            pa.array(turns, pa.string()),
            pa.array([digests[i] for i in record], pa.binary()),
            pa.array(lengths, pa.int32()),
            pa.array(parts.trained, pa.int32()),
        ]
        return pa.RecordBatch.from_arrays([*lists, *columns], schema=SCHEMA)

    def _part(self, ids: NDArray[np.int32]) -> str:
        """The turns of a part of a text; each part with the whole text would be that text many times over."""
        text = self.template.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return to_json((Turn("text", text),))


def tokens_column(names: Sequence[str]) -> str:
    """The column that counts the tokens of a row: pairs, whose length is that of the longer side, have their own."""
    return "tokens" if "tokens" in names else "length"


def printable(where: str) -> str:
    """A place whose file name need not be UTF-8, as a text that is."""
    return where if where.isascii() else where.encode("utf-8", "backslashreplace").decode()


class Merger:
    """Puts the blocks of a split together, in their order."""

    def __init__(self, data: DataSection, account: Account) -> None:
        self.data, self.account = data, account
        self._seen = Seen() if data.deduplicate else None

    def add(self, block: Block) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
        """Count a block; gives the rows that stay, and for each of them its record in the block.

        Raises :class:`DataError` where there are more bad records than allowed, or one that ends the preparation.
        """
        account = self.account
        account.records += block.records
        account.format = account.format or block.form
        for place, line in block.faults:
            if block.refusal is not None and block.refusal[0] < place:
                break
            account.note_bad(line, self.data.max_bad_records)
        if block.refusal is not None:
            raise DataError(block.refusal[1])
        assert block.rows is not None
        rows, record, verdicts = block.rows, block.record, block.verdicts
        new = np.ones(len(verdicts), np.bool_) if self._seen is None else new_among(block.digests, self._seen)
        if not new.all():
            rows = rows.filter(pa.array(new[record]))
            record = record[new[record]]
        self._count(block, new, rows)
        return rows, record

    def _count(self, block: Block, new: NDArray[np.bool_], rows: pa.RecordBatch) -> None:
        account = self.account
        counts = np.bincount(block.verdicts[new], minlength=len(Verdict)).tolist()
        account.duplicates += int((~new).sum())
        account.too_long += counts[Verdict.TOO_LONG]
        account.too_short_response += counts[Verdict.TOO_SHORT_RESPONSE]
        account.too_long_response += counts[Verdict.TOO_LONG_RESPONSE]
        account.note_untrained(where for place, where in block.wheres.items() if new[place])
        kept = new & (block.verdicts == Verdict.ROWS)
        account.truncated += int((kept & block.truncated).sum())
        account.split += int((kept & block.split).sum())
        account.rows += rows.num_rows
        account.tokens += int(rows.column(tokens_column(rows.schema.names)).to_numpy().sum())
        account.trained_tokens += int(rows.column("trained").to_numpy().sum())
