"""Tokens and loss mask of a conversation, from the character spans of its responses.

The whole text is tokenized once and a token is trained when it covers a character of a response. Where a
token would straddle the border between prompt and response (a prompt that ends in a newline before a
response that begins with one), the text is tokenized piece by piece instead: that is what the model meets
when it generates, since the prompt is then tokenized alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_dist.data.template import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that torch's cross entropy leaves out


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
    """Tokenizes rendered conversations. `max_length` in tokens, None for no limit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._pieces_are_exact = _joins_exactly(tokenizer)
        plain = tokenizer("a", add_special_tokens=True)["input_ids"]
        self._bos = plain[:1] if plain and plain[0] == tokenizer.bos_token_id else []

    def __call__(self, rows: Sequence[Rendered], raw: bool = False) -> list[Tokens]:
        """Tokens and labels of each row. `raw`: plain text, which gets the tokenizer's bos token in front."""
        encoded: Any = self.tokenizer([r.text for r in rows], add_special_tokens=False, return_offsets_mapping=True)
        bos = self._bos if raw else []
        return [
            self._finish(row, *self._one(row, ids, offsets), bos)
            for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _one(self, row: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ranges = covered(offsets)
        if self._pieces_are_exact and _straddles(ranges, row.spans):
            return self._by_pieces(row)
        return ids, mask(ranges, row.spans)

    def _by_pieces(self, row: Rendered) -> tuple[list[int], list[bool]]:
        """Ids and mask with a token border at every border of a response."""
        ids: list[int] = []
        trained: list[bool] = []
        position = 0
        borders = [b for span in row.spans for b in span] + [len(row.text)]
        for number, border in enumerate(borders):
            piece: list[int] = self.tokenizer(row.text[position:border], add_special_tokens=False)["input_ids"]
            ids += piece
            trained += [number % 2 == 1] * len(piece)
            position = border
        return ids, trained

    def _finish(self, row: Rendered, ids: list[int], trained: list[bool], bos: list[int]) -> Tokens:
        ids, trained = bos + ids, [False] * len(bos) + trained
        if row.append_eos and self.tokenizer.eos_token_id is not None:
            ids, trained = [*ids, self.tokenizer.eos_token_id], [*trained, True]
        # The first token of a row is predicted by nothing: counting it would skew the mean.
        labels = [IGNORE] + [i if t else IGNORE for i, t in zip(ids[1:], trained[1:], strict=True)]
        cut = self.max_length is not None and len(ids) > self.max_length
        return Tokens(ids[: self.max_length], labels[: self.max_length], cut)


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
