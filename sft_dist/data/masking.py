"""Tokens and loss mask of a conversation, from the character spans of its responses.

The whole text is tokenized once and a token is trained when it covers a character of a response. Where a
token would straddle the border between prompt and response (a prompt that ends in a newline before a
response that begins with one), the text is tokenized piece by piece instead: that is what the model meets
when it generates, since the prompt is then tokenized alone.

Where tokens end is summed up from the vocabulary for a batch of rows at once (see `borders`); rows for which that
is not shown to be exact are asked of the tokenizer, token by token. Both ways give the same.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.borders import ByteLengths, byte_lengths
from sft_dist.data.encoder import PLAIN, Encoded, Encoder, PlainEncoder, bare_backend, choose, joined
from sft_dist.data.template import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that torch's cross entropy leaves out
# Rows from which on it is worth a moment to look up the vocabulary, and to set up another encoder.
WORTH_A_TABLE, WORTH_AN_ENCODER = 256, 2048


class Masked(NamedTuple):
    """Whole rows: ids and trained tokens of row i are at `starts[i] : starts[i + 1]`; int32, bool and int64."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row: `input_ids` and `labels` of equal length; `truncated` tells that tokens were cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def trained(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(label != IGNORE for label in self.labels)


class Masker:
    """Tokenizes rendered conversations. `max_length` in tokens, None for no limit.

    `fast=False`: `fastokens` is left out. What is fast takes a moment to set up and is worth it after some rows only;
    `warm` sets it up at once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, fast: bool = True, warm: bool = False
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._fast = fast
        self._rows = WORTH_AN_ENCODER if warm else 0
        self._pieces_are_exact = _joins_exactly(tokenizer)
        plain = tokenizer("a", add_special_tokens=True)["input_ids"]
        self._bos = plain[:1] if plain and plain[0] == tokenizer.bos_token_id else []

    def __reduce__(self) -> tuple[Any, ...]:
        return Masker, (self.tokenizer, self.max_length, self._fast, True)

    @cached_property
    def _bytes(self) -> ByteLengths | None:
        return byte_lengths(bare_backend(self.tokenizer))

    @cached_property
    def _best(self) -> Encoder:
        return choose(self.tokenizer, self._fast)

    def encoder_of(self, records: int) -> str:
        """The name of what makes ids where there are so many records."""
        return PLAIN if records < WORTH_AN_ENCODER or self._bytes is None else self._best.name

    def __call__(self, rows: Sequence[Rendered], raw: bool = False) -> list[Tokens]:
        """Tokens and labels of each row, cut on the right to `max_length`."""
        ids, trained, starts = self.whole(rows, raw)
        found = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            stop = end if self.max_length is None else min(end, start + self.max_length)
            labels = np.where(trained[start:stop], ids[start:stop], IGNORE)
            # The first token of a row is predicted by nothing: counting it would skew the mean.
            labels[:1] = IGNORE
            found.append(Tokens(ids[start:stop].tolist(), labels.tolist(), stop < end))
        return found

    def whole(self, rows: Sequence[Rendered], raw: bool = False) -> Masked:
        """Ids and mask of each row, at full length. `raw`: plain text, which gets the tokenizer's bos in front.

        Raises :class:`EncoderDiffers` as the encoder does.
        """
        self._rows += len(rows)
        if self._rows < WORTH_A_TABLE or self._bytes is None or not rows:
            return self._around(rows, self._slow(rows), raw)
        encoder = self._best if self._rows >= WORTH_AN_ENCODER else PlainEncoder(self.tokenizer)
        encoded = encoder([row.text for row in rows])
        trained, unsure = _by_bytes(rows, encoded, self._bytes)
        cuts = [slice(*cut) for cut in itertools.pairwise(encoded.starts.tolist())]
        found = [(encoded.ids[cut], trained[cut]) for cut in cuts]
        again = np.flatnonzero(unsure).tolist()
        for number, row in zip(again, self._slow([rows[i] for i in again]), strict=True):
            found[number] = row
        return self._around(rows, found, raw)

    def _slow(self, rows: Sequence[Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Ids and masks by the tokenizer's own offsets, or piece by piece where a token straddles a border."""
        found = []
        for row, encoding in zip(rows, self._encodings([row.text for row in rows]), strict=True):
            ranges = covered(encoding.offsets)
            if self._pieces_are_exact and _straddles(ranges, row.spans):
                found.append(self._by_pieces(row))
            else:
                found.append((np.array(encoding.ids, np.int32), np.array(mask(ranges, row.spans), np.bool_)))
        return found

    def _encodings(self, texts: list[str]) -> list[Any]:
        encodings: list[Any] = bare_backend(self.tokenizer).encode_batch(texts, add_special_tokens=False)
        return encodings

    def _by_pieces(self, row: Rendered) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask with a token border at every border of a response."""
        borders = [0, *(b for span in row.spans for b in span), len(row.text)]
        texts = [row.text[start:end] for start, end in itertools.pairwise(borders)]
        pieces = [encoding.ids for encoding in self._encodings(texts)]
        trained = [number % 2 == 1 for number, piece in enumerate(pieces) for _ in piece]
        return np.array([i for piece in pieces for i in piece], np.int32), np.array(trained, np.bool_)

    def _around(
        self, rows: Sequence[Rendered], found: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]], raw: bool
    ) -> Masked:
        """The rows with bos in front of plain text, and eos behind those whose template writes none."""
        bos, eos = np.array(self._bos if raw else [], np.int32), self.tokenizer.eos_token_id
        ids: list[NDArray[np.int32]] = []
        trained = []
        for row, (own, flags) in zip(rows, found, strict=True):
            behind = [eos] if row.append_eos and eos is not None else []
            if len(bos) or behind:
                own = np.concatenate([bos, own, np.array(behind, np.int32)])
                flags = np.concatenate([np.zeros(len(bos), np.bool_), flags, np.ones(len(behind), np.bool_)])
            ids.append(own)
            trained.append(flags)
        together = joined(ids)
        return Masked(together.ids, np.concatenate([np.zeros(0, np.bool_), *trained]), together.starts)


def _by_bytes(
    rows: Sequence[Rendered], encoded: Encoded, lengths: ByteLengths
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The mask of all tokens, and the rows for which it is not shown to be right or in which a token straddles."""
    known = encoded.ids < len(lengths.table)
    sizes = np.where(known, lengths.table[np.where(known, encoded.ids, 0)], -1).astype(np.int64)
    ends = np.cumsum(np.abs(sizes))
    # Where each row begins and ends in the bytes of all of them, by its tokens.
    cuts = np.concatenate([[0], ends])[encoded.starts]
    own = [_byte_spans(row, lengths) for row in rows]
    unsure = np.diff(cuts) != np.array([size for size, _ in own], np.int64)
    unsure[np.searchsorted(encoded.starts, np.flatnonzero(sizes < 0), side="right") - 1] = True
    sure = [(i, own[i][1]) for i in np.flatnonzero(~unsure).tolist()]
    row_of = np.repeat([i for i, _ in sure], [len(spans) for _, spans in sure]).astype(np.int64)
    spans = np.array([span for _, spans in sure for span in spans], np.int64).reshape(-1, 2) + cuts[row_of, None]
    begins = ends - np.abs(sizes)
    unsure[row_of[_cut_a_token(spans, begins, ends)]] = True
    first = np.searchsorted(ends, spans[:, 0], side="right")
    behind = np.searchsorted(begins, spans[:, 1], side="left")
    edges = np.zeros(len(ends) + 1, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, np.maximum(first, behind), -1)
    return np.cumsum(edges[:-1]) > 0, unsure


def _byte_spans(row: Rendered, lengths: ByteLengths) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of a row's text, and its spans in bytes; (-1, no span) where bytes would not tell the truth."""
    text = row.text
    borders = [border for span in row.spans for border in span]
    if (lengths.trims and text[:1] == " ") or borders != sorted(borders):
        return -1, []
    if text.isascii():
        return len(text), list(row.spans)
    if lengths.nfc and not unicodedata.is_normalized("NFC", text):
        return -1, []
    total, position, places = 0, 0, []
    for border in (*borders, len(text)):
        total += len(text[position:border].encode())
        position = border
        places.append(total)
    return total, list(zip(places[:-1:2], places[1:-1:2], strict=True))


def _cut_a_token(spans: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The spans of which a border lies inside a token."""
    token = np.searchsorted(ends, spans, side="right")
    begin = np.append(begins, np.iinfo(np.int64).max)[token]
    return np.asarray((begin < spans).any(axis=1))


def covered(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters each token stands for, from a fast tokenizer's offsets.

    Some tokenizers (OPT's among them) trim leading space from their offsets, which leaves a token of white
    space with no character at all. What lies between the end of one token and the start of the next
    belongs to the next.
    """
    ranges = []
    end = 0
    for start, stop in offsets:
        ranges.append((min(start, end), stop))
        end = max(end, stop)
    return ranges


def mask(ranges: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens cover a character of a span. Both sequences are in the order of the text."""
    trained = []
    number = 0
    for start, stop in ranges:
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        trained.append(number < len(spans) and start < spans[number][1] and stop > spans[number][0])
    return trained


def _straddles(ranges: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bool:
    borders = iter([b for span in spans for b in span])
    border = next(borders, None)
    for start, stop in ranges:
        while border is not None and border <= start:
            border = next(borders, None)
        if border is None:
            return False
        if stop > border:
            return True
    return False


def _joins_exactly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether pieces of a text, tokenized alone, say the same as the text.

    SentencePiece tokenizers put a space in front of each text, so that a piece would gain a character.
    """
    ids: list[int] = []
    for piece in ("\n", "b", " c\n", "\n", "d"):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "\nb c\n\nd")
