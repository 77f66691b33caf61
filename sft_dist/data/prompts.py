"""Prompts as rows: what a model is given to answer, of records of any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sft_dist.config import DataSection, Recipe
from sft_dist.data import formats
from sft_dist.data.digests import digest
from sft_dist.data.fields import Fields
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import Conversation, Fault, Record, Turn, to_json
from sft_dist.data.lengths import Verdict
from sft_dist.data.masking import Masker
from sft_dist.data.pair_formats import is_pair, parse_pair
from sft_dist.data.prepare import TrainingRows, prepare
from sft_dist.data.rows import Kind, Prepared
from sft_dist.data.template import ChatTemplate
from sft_dist.data.work import Block, printable, read_batch
from sft_dist.errors import UserError

PROMPT = "prompt"
_COLUMNS = ("query", "prompt")
PROMPT_SCHEMA = pa.schema(
    {"prompt_ids": pa.list_(pa.int32()), "where": pa.string(), "turns": pa.string(), "answer": pa.string(),
     "digest": pa.binary(), "length": pa.int32(), "trained": pa.int32()}
)  # fmt: skip


def prepare_prompts(
    recipe: Recipe, template: ChatTemplate, limit: int | None
) -> tuple[TrainingRows, Prepared | None]:  # fmt: skip
    """The prompts that are trained on and those held out, or None where the recipe holds nothing out.

    The rows have the columns of `PROMPT_SCHEMA`: `prompt_ids`, up to where the answer begins; `where`; `turns`, the
    prompt as JSON; `answer`, of the record, empty where it has none; `digest`, of the prompt, 16 bytes; `length`, its
    tokens; `trained`, 0. A prompt of more than `limit` tokens is a fault of its record. Raises :class:`DataError` as
    :func:`prepare` does.
    """
    return prepare(recipe, template, limit, PROMPTS)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, which ends with a turn of the user, and the answer of the record, empty where it has none."""

    turns: Conversation
    answer: str


def parse_prompt(record: Record) -> Asked:
    """The prompt of a record of any format: all before its last answer. Raises :class:`Fault`."""
    if is_pair(record):
        pair = parse_pair(record)
        if pair.is_text:
            raise Fault("its prompt is not told apart by turns; give it a column prompt")
        return Asked(pair.prompt, pair.chosen)
    try:
        name = formats.detect(record)
    except Fault:
        return Asked(_asked(record), "")
    if name == "text":
        raise Fault("plain text has no prompt; give it a column prompt")
    turns = formats.parse(record, name)
    return Asked(turns[:-1], turns[-1].content)


def _asked(record: Record) -> Conversation:
    column = next((name for name in _COLUMNS if record.get(name) is not None), None)
    if column is None:
        raise Fault(f"there is no prompt: neither query, prompt nor another format (it has {formats.names_of(record)})")
    value = record[column]
    if isinstance(value, list):
        turns = formats.turn_list(value, column)
    else:
        turns = [*formats.system_turns(record), Turn("user", formats.text_in(value, column))]
    if not turns or turns[-1].role != "user":
        raise Fault(f"{column} does not end with a turn of the user")
    # The rules for turns are those of a conversation with its answer.
    return formats.checked_chat([*turns, Turn("assistant", "-")])[:-1]


class PromptReader:
    """Turns raw records into prompts, by the recipe's own function first where it names one."""

    form = PROMPT

    def __init__(self, data: DataSection) -> None:
        self._fields = Fields(data)

    def __call__(self, raw: RawRecord) -> Asked:
        """The prompt of a record. Raises :class:`Fault`."""
        record = self._fields(raw)
        return parse_prompt(record)


class PromptWork:
    """Makes blocks of batches of raw records."""

    def __init__(self, data: DataSection, template: ChatTemplate, masker: Masker) -> None:
        self.data, self.template, self.limit = data, template, masker.max_length

    def __call__(self, batch: Sequence[RawRecord], form: str, limit: int | None = None) -> Block:
        """The block of a batch. With `limit`, the batch ends behind so many prompts."""
        block, good = read_batch(batch, PromptReader(self.data), limit)
        rows: list[dict[str, Any]] = []
        for place, where, asked in good:
            try:
                ids = prompt_ids(self.template, asked.turns)
                if self.limit is not None and len(ids) > self.limit:
                    raise Fault(too_long(len(ids), self.limit))
            except Fault as fault:
                block.note(place, where, fault)
                continue
            turns = to_json(asked.turns)
            rows.append({"prompt_ids": ids, "where": printable(where), "turns": turns, "answer": asked.answer,
                         "digest": digest(turns), "length": len(ids), "trained": 0})  # fmt: skip
        block.faults.sort()
        block.verdicts = np.full(len(rows), Verdict.ROWS, np.uint8)
        block.truncated = block.split = np.zeros(len(rows), np.bool_)
        block.record = np.arange(len(rows))
        block.digests = [row["digest"] for row in rows]
        block.rows = pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)
        return block


def too_long(tokens: int, room: int) -> str:
    """What is wrong with a prompt that leaves no room for an answer."""
    return f"the prompt has {tokens} tokens, ppo.response_length leaves room for {room}"


def prompt_ids(template: ChatTemplate, turns: Conversation) -> list[int]:
    """The tokens that a model is given to answer the last turn. Raises :class:`Fault`."""
    ids: list[int] = template.tokenizer(template.prompt(turns), add_special_tokens=False)["input_ids"]
    return ids


def room_for_prompts(recipe: Recipe, limit: int | None) -> int | None:
    """Tokens that a prompt may have beside the longest response. Raises :class:`UserError` where none are left."""
    if limit is None:
        return None
    room = limit - recipe.ppo.response_length
    if room < 1:
        raise UserError(
            f"ppo.response_length: {recipe.ppo.response_length} tokens leave no room for a prompt in rows of {limit} "
            "(train.max_length); lower it"
        )
    return room


PROMPTS = Kind(PROMPT, PROMPT_SCHEMA, PromptWork)
