"""Formats of preference records, turned into one canonical pair.

A pair is a prompt and two answers to it, of which people or a model preferred the first. The prompt may stand in a
column of its own (`prompt`, `conversations`, `messages`, `instruction`), or inside both sides:

| prompt | a side |
|---|---|
| text, or a list of turns | the answer as a text, as one turn, or as a list of one turn |
| a list of turns in each side, equal up to the last | that list |
| `\\n\\nHuman: ...\\n\\nAssistant: ...` in each side | that text, as in Anthropic's HH-RLHF |
| the beginning that two texts have in common | those texts |
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_dist.config import DataSection
from sft_dist.data.fields import Fields
from sft_dist.data.files import RawRecord
from sft_dist.data.formats import (
    Conversation,
    Fault,
    Record,
    Turn,
    checked_chat,
    instruction_turns,
    names_of,
    system_turns,
    text_in,
    to_json,
    turn_list,
)

PREFERENCE = "preference"
# Of which the rows are pairs.
PAIR_STAGES = ("reward", "dpo")
SIDES = ("chosen", "rejected")
_PROMPTS = ("prompt", "conversations", "conversation", "messages", "instruction")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (turns up to the user's last one, or one `text` turn that the answers go on) and its two answers.

    `margin`: by how much the chosen one is to be ahead, where the record says.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float | None = None

    def whole(self, answer: str) -> Conversation:
        """The prompt with an answer to it."""
        if self.is_text:
            return (Turn("text", self.prompt[0].content + answer),)
        return (*self.prompt, Turn("assistant", answer))

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, which no template is put around."""
        return self.prompt[0].role == "text"


def pair_to_json(pair: Pair) -> str:
    """The text by which equal pairs are known."""
    return "\n".join(to_json(pair.whole(answer)) for answer in (pair.chosen, pair.rejected)) + f"\n{pair.margin}"


def is_pair(record: Record) -> bool:
    """Whether a record has the columns of a pair."""
    return all(side in record for side in SIDES)


def parse_pair(record: Record) -> Pair:
    """The checked pair of a record. Raises :class:`Fault`."""
    for side in SIDES:
        if side not in record:
            raise Fault(f"the column {side} is missing (it has {names_of(record)})")
        if record[side] is None:
            raise Fault(f"{side} is missing: a pair has two answers")
    margin = _margin(record.get("margin"))
    head = _head(record)
    texts = [record[side] for side in SIDES]
    if head is None and all(isinstance(text, str) for text in texts):
        pair = _from_texts(text_in(texts[0], "chosen"), text_in(texts[1], "rejected"), margin)
    else:
        pair = _from_turns(record, head, margin)
    for side, answer in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
        if not answer.strip():
            raise Fault(f"{side} is empty: a pair has two answers")
    if pair.chosen.strip() == pair.rejected.strip():
        raise Fault("chosen and rejected are equal, so that nothing is preferred")
    return pair


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Fault(f"margin must be a finite number, got {value!r}")
    return float(value)


def _head(record: Record) -> list[Turn] | None:
    """The prompt that has a column of its own, or None."""
    column = next((name for name in _PROMPTS if record.get(name) is not None), None)
    if column is None:
        return None
    if column == "instruction":
        return instruction_turns(record)
    value = record[column]
    if column == "prompt" and not isinstance(value, list):
        turns = [Turn("user", text_in(value, column))]
    else:
        turns = turn_list(value, column)
    return turns if turns[:1] and turns[0].role == "system" else [*system_turns(record), *turns]


def _from_turns(record: Record, head: list[Turn] | None, margin: float | None) -> Pair:
    wholes = []
    for side in SIDES:
        turns = _side(record[side], side)
        if not turns:
            raise Fault(f"{side} is empty: a pair has two answers")
        if turns[-1].role != "assistant":
            raise Fault(f"{side} ends with a turn of the {turns[-1].role}, where the answer must stand")
        if turns[0].role == "assistant":
            if head is None:
                raise Fault(f"{side} is an answer without a prompt; add a column prompt")
            turns = [*head, *turns]
        elif head is not None:
            turns = _with_head(head, turns, side)
        if not turns[-1].content.strip():
            raise Fault(f"{side} is empty: a pair has two answers")
        wholes.append(_checked(turns, side))
    chosen, rejected = wholes
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        number = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), min(len(chosen), len(rejected)))
        raise Fault(f"chosen and rejected differ in turn {number}, which is not their last; cut them to one prompt")
    return Pair(chosen[:-1], chosen[-1].content, rejected[-1].content, margin)


def _side(value: Any, side: str) -> list[Turn]:
    if isinstance(value, str):
        return [Turn("assistant", text_in(value, side))]
    try:
        return turn_list([value] if isinstance(value, Mapping) else value, side)
    except Fault as fault:
        raise fault if str(fault).startswith(side) else Fault(f"{side}: {fault}") from fault


def _with_head(head: list[Turn], turns: list[Turn], side: str) -> list[Turn]:
    """A side that holds the prompt itself, which has a column, too. Only that may have a system turn."""
    own = [turn for turn in turns if turn.role != "system"]
    if own[:-1] != [turn for turn in head if turn.role != "system"]:
        raise Fault(f"{side} begins with another prompt than the record's own; keep one of the two")
    return [*head, own[-1]] if head[0].role == "system" else turns


def _checked(turns: list[Turn], side: str) -> Conversation:
    try:
        return checked_chat(turns)
    except Fault as fault:
        raise Fault(f"{side}: {fault}") from fault


def _from_texts(chosen: str, rejected: str, margin: float | None) -> Pair:
    """Two texts that begin with their prompt."""
    spoken = [_dialogue(text) for text in (chosen, rejected)]
    if spoken[0] and spoken[1]:
        return _from_turns(dict(zip(SIDES, spoken, strict=True)), None, margin)
    if chosen.strip() == rejected.strip():
        raise Fault("chosen and rejected are equal, so that nothing is preferred")
    length = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    # A word that both begin alike belongs to the answers, with the space before it, as a tokenizer has it.
    while length and not (chosen[length : length + 1].isspace() and rejected[length : length + 1].isspace()):
        length -= 1
    prompt = chosen[:length]
    if not prompt.strip():
        raise Fault("chosen and rejected have no beginning in common that is their prompt; add a column prompt")
    return Pair((Turn("text", prompt),), chosen[length:], rejected[length:], margin)


def _dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a text in the manner of HH-RLHF; none where it is another text."""
    first, *parts = _SPEAKER.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if first.strip() or not parts:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


class PairReader:
    """Turns raw records into pairs, by the recipe's own function first where it names one."""

    form = PREFERENCE

    def __init__(self, data: DataSection) -> None:
        self._fields = Fields(data)

    def __call__(self, raw: RawRecord) -> Pair:
        """The pair of a record. Raises :class:`Fault`."""
        record = self._fields(raw)
        return parse_pair(record)
