"""Preference pairs as rows: prompt, chosen and rejected answer as tokens, prepared and cached as all rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_dist.config import DataSection, Recipe
from sft_dist.data.digests import digest
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Conversation, Fault, to_json
from sft_dist.data.lengths import Verdict
from sft_dist.data.masking import Masker
from sft_dist.data.pair_formats import PREFERENCE, SIDES, Pair, PairReader, pair_to_json
from sft_dist.data.prepare import TrainingRows, prepare
from sft_dist.data.rows import Kind, Prepared
from sft_dist.data.template import ChatTemplate, Rendered
from sft_dist.data.work import Block, printable, read_batch

Ids = NDArray[np.int32]
_INTS = pa.list_(pa.int32())
PAIR_SCHEMA = pa.schema(
    {"prompt_ids": _INTS, "chosen_ids": _INTS, "rejected_ids": _INTS, "margin": pa.float64(), "where": pa.string(),
     "turns": pa.string(), "chosen": pa.string(), "rejected": pa.string(), "digest": pa.binary(),
     "length": pa.int32(), "tokens": pa.int32(), "trained": pa.int32()}
)  # fmt: skip


def prepare_pairs(
    recipe: Recipe, template: ChatTemplate, limit: int | None
) -> tuple[TrainingRows, Prepared | None]:  # fmt: skip
    """The pairs that are trained on and those held out, or None where the recipe holds nothing out.

    The rows have the columns of `PAIR_SCHEMA`: `prompt_ids`; `chosen_ids` and `rejected_ids`, which go on behind them
    and end with what ends an answer; `margin`, null where the data have none; `where`; `turns`, the prompt as JSON;
    the texts `chosen` and `rejected`; `digest`, of the pair, 16 bytes; `length`, tokens of the longer side with the
    prompt; `tokens`, of both sides with the prompt; `trained`, of both answers.

    Pairs of which a side has more than `limit` tokens are left out and counted, never cut. Raises
    :class:`DataError` as :func:`prepare` does.
    """
    return prepare(recipe, template, limit, PAIRS)


@dataclass(frozen=True, slots=True)
class PairTokens:
    """The tokens of a pair; those of the answers alone in `chosen` and `rejected`."""

    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def sides(self) -> tuple[Ids, Ids]:
        """Prompt and chosen answer, prompt and rejected answer."""
        return np.concatenate([self.prompt, self.chosen]), np.concatenate([self.prompt, self.rejected])

    @property
    def length(self) -> int:
        """Tokens of the longer side, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class PairWork:
    """Makes blocks of batches of raw records. Raises :class:`EncoderDiffers` as the masker does."""

    def __init__(self, data: DataSection, template: ChatTemplate, masker: Masker) -> None:
        self.data, self.template, self.masker = data, template, masker

    def __call__(self, batch: Sequence[RawRecord], form: str, limit: int | None = None) -> Block:
        """The block of a batch. With `limit`, the batch ends behind so many pairs."""
        block, good = read_batch(batch, PairReader(self.data), limit)
        shown: list[tuple[str, Pair, PairTokens]] = []
        for (place, where, pair), found in zip(
            good, pair_tokens([pair for _, _, pair in good], self.template, self.masker), strict=True
        ):
            if isinstance(found, Fault):
                block.note(place, where, found)
            else:
                shown.append((where, pair, found))
        block.faults.sort()
        longest = self.masker.max_length or np.iinfo(np.int64).max
        long = np.array([tokens.length > longest for _, _, tokens in shown], np.bool_)
        block.verdicts = np.where(long, Verdict.TOO_LONG, Verdict.ROWS).astype(np.uint8)
        block.truncated = block.split = np.zeros(len(shown), np.bool_)
        block.record = np.flatnonzero(~long)
        texts = [pair_to_json(pair) for _, pair, _ in shown]
        block.digests = [digest(text) for text in texts]
        block.rows = _table([(*shown[i], block.digests[i]) for i in block.record.tolist()])
        return block


PAIRS = Kind(PREFERENCE, PAIR_SCHEMA, PairWork)


def pair_tokens(pairs: Sequence[Pair], template: ChatTemplate, masker: Masker) -> list[PairTokens | Fault]:
    """The tokens of each pair, or what is wrong with it.

    Each side is what the model sees of the whole conversation, up to the token that ends the answer. Where the
    tokenizer joins the prompt with one answer otherwise than with the other, the tokens that differ are the answers'.
    """
    conversations = [pair.whole(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    heads = [len(pair.prompt[0].content) if pair.is_text else 0 for pair in pairs for _ in SIDES]
    sides = answered(conversations, template, masker, heads)
    found: list[PairTokens | Fault] = []
    for number in range(len(pairs)):
        chosen, rejected = sides[2 * number : 2 * number + 2]
        if isinstance(chosen, Fault) or isinstance(rejected, Fault):
            side, fault = ("chosen", chosen) if isinstance(chosen, Fault) else ("rejected", rejected)
            found.append(Fault(f"{side}: {fault}"))
        else:
            found.append(_split(chosen, rejected))
    return found


def _split(chosen: tuple[Ids, int], rejected: tuple[Ids, int]) -> PairTokens | Fault:
    prompts = min(chosen[1], rejected[1])
    differ = np.flatnonzero(chosen[0][:prompts] != rejected[0][:prompts])
    border = int(differ[0]) if len(differ) else prompts
    if np.array_equal(chosen[0], rejected[0]):
        return Fault("chosen and rejected are equal as tokens, so that nothing is preferred")
    if border == 0:
        return Fault("no token stands before the answers")
    return PairTokens(chosen[0][:border], chosen[0][border:], rejected[0][border:])


def answered(
    conversations: Sequence[Conversation], template: ChatTemplate, masker: Masker, heads: Sequence[int] | None = None
) -> list[tuple[Ids, int] | Fault]:
    """The tokens of each conversation up to the end of its last answer, and where that answer begins.

    `heads`: the characters of each plain text that are its prompt; none where it is left out.
    """
    found: list[tuple[Ids, int] | Fault] = [Fault("not rendered")] * len(conversations)
    shown: dict[bool, list[tuple[int, Rendered]]] = {False: [], True: []}
    for place, rendered in enumerate(template.render_all(conversations)):
        if isinstance(rendered, Fault):
            found[place] = rendered
        else:
            raw = conversations[place][0].role == "text"
            start, stop = rendered.spans[-1]
            span = (heads[place] if raw and heads is not None else start, stop)
            shown[raw].append((place, Rendered(rendered.text, (span,), rendered.append_eos)))
    for raw, some in shown.items():
        whole = masker.whole([rendered for _, rendered in some], raw)
        for (place, _), start, stop in zip(some, whole.starts[:-1].tolist(), whole.starts[1:].tolist(), strict=True):
            trained = np.flatnonzero(whole.trained[start:stop])
            if len(trained):
                found[place] = (whole.ids[start : start + int(trained[-1]) + 1], int(trained[0]))
            else:
                found[place] = Fault("the answer has no token")
    return found


def _table(rows: Sequence[tuple[str, Pair, PairTokens, bytes]]) -> pa.RecordBatch:
    tokens = [one for _, _, one, _ in rows]
    answers = [len(one.chosen) + len(one.rejected) for one in tokens]
    columns = [
        *(_lists(ids) for ids in ([one.prompt for one in tokens], [one.chosen for one in tokens],
                                  [one.rejected for one in tokens])),
        pa.array([pair.margin for _, pair, _, _ in rows], pa.float64()),
        pa.array([printable(where) for where, _, _, _ in rows], pa.string()),
        pa.array([to_json(pair.prompt) for _, pair, _, _ in rows], pa.string()),
        pa.array([pair.chosen for _, pair, _, _ in rows], pa.string()),
        pa.array([pair.rejected for _, pair, _, _ in rows], pa.string()),
        pa.array([held for _, _, _, held in rows], pa.binary()),
        pa.array([one.length for one in tokens], pa.int32()),
        pa.array([2 * len(one.prompt) + both for one, both in zip(tokens, answers, strict=True)], pa.int32()),
        pa.array(answers, pa.int32()),
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, schema=PAIR_SCHEMA)


def _lists(ids: Sequence[Ids]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *ids])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
