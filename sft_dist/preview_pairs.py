"""Preference pairs in a preview, and a sample of them checked before a run (see `sft_dist.preview`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sft_dist.config import DataSection
from sft_dist.data.account import Account
from sft_dist.data.conversations import read_records
from sft_dist.data.formats import Fault
from sft_dist.data.masking import Masker
from sft_dist.data.pair_formats import PREFERENCE, PairReader
from sft_dist.data.pairs import PairTokens, pair_tokens
from sft_dist.data.sources import Source
from sft_dist.data.template import ChatTemplate
from sft_dist.render.preview import PreviewRecord, TokenSpan

_AT_ONCE = 64


def pair_rows(
    source: Source, data: DataSection, template: ChatTemplate, masker: Masker, account: Account, limit: int
) -> Iterator[tuple[str, PairTokens]]:
    """The pairs among the first `limit` good records of a source, as they are prepared; what is left out is counted.

    Raises :class:`DataError` as the preparation does.
    """
    pairs = read_records(source, PairReader(data), data, account, limit)
    while batch := list(itertools.islice(pairs, _AT_ONCE)):
        found = pair_tokens([pair for _, pair in batch], template, masker)
        for (where, _), tokens in zip(batch, found, strict=True):
            if isinstance(tokens, Fault):
                account.note_bad(f"{where}: {tokens}", data.max_bad_records)
            elif masker.max_length is not None and tokens.length > masker.max_length:
                account.too_long += 1
            else:
                account.rows += 1
                account.tokens += sum(map(len, tokens.sides))
                account.trained_tokens += len(tokens.chosen) + len(tokens.rejected)
                yield where, tokens


def pair_previews(rows: Iterator[tuple[str, PairTokens]], template: ChatTemplate) -> Iterator[PreviewRecord]:
    """Both sides of each pair, the answer marked as what is trained."""
    for where, tokens in rows:
        for side, answer in (("chosen", tokens.chosen), ("rejected", tokens.rejected)):
            spans = [
                TokenSpan(
                    template.tokenizer.decode(
                        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
                    ),
                    trained,
                )
                for ids, trained in ((tokens.prompt, False), (answer, True))
            ]
            yield PreviewRecord(
                where=f"{where}, {side}",
                spans=tuple(spans),
                tokens=len(tokens.prompt) + len(answer),
                trained_tokens=len(answer),
                truncated=False,
                format=PREFERENCE,
            )
