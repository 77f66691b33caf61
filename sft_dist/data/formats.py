"""Formats of records, turned into one canonical conversation, and the faults a record can have.

Every format becomes a :class:`Conversation`: turns of system, user and assistant, or one `text` turn for
plain text. A record that cannot become one raises :class:`Fault`, which says what is wrong with it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.errors import DataError

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")


class Fault(Exception):
    """What is wrong with one record, in words that fit behind `FILE: record N: `."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: `role` is system, user, assistant, or text (plain text, trained whole)."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


def to_json(turns: Conversation) -> str:
    """A conversation as it is kept beside its row, and by which equal ones are known."""
    return json.dumps([(turn.role, turn.content) for turn in turns], ensure_ascii=False)


def from_json(text: str) -> Conversation:
    """The conversation that `to_json` wrote."""
    return tuple(Turn(role, content) for role, content in json.loads(text))


Record = Mapping[str, Any]


def detect(record: Record) -> str:
    """The format of a record by its columns. Raises :class:`Fault` when no format fits."""
    for name, wanted in COLUMNS.items():
        if all(any(c in record for c in choice) for choice in wanted):
            return name
    if "chosen" in record and "rejected" in record:
        raise Fault("chosen and rejected are a preference pair; set stage to reward or dpo, which train on pairs")
    known = "; ".join(" + ".join("/".join(c) for c in wanted) for wanted in COLUMNS.values())
    raise Fault(f"the columns {names_of(record)} fit no format ({known}); set data.formatting to a function of yours")


def parse(record: Record, name: str) -> Conversation:
    """A record of the named format as a checked conversation.

    The last turn is always the assistant's: a question without an answer at the end is left out, since
    nothing of it would be trained. Raises :class:`Fault`.
    """
    for choice in COLUMNS[name]:
        if not any(c in record for c in choice):
            raise Fault(f"the column {'/'.join(choice)} is missing (it has {names_of(record)})")
    turns = _PARSERS[name](record)
    return _checked_text(turns) if name == "text" else checked_chat(turns)


def load_hook(path: str) -> Callable[[dict[str, Any]], Record]:
    """The user's function behind `package.module:function`. Raises :class:`DataError`."""
    module_name, _, function_name = path.partition(":")
    try:
        hook = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"data.formatting: {path}: {error}; it must be package.module:function, importable from here"
        ) from error
    if not callable(hook):
        raise DataError(f"data.formatting: {path} is a {type(hook).__name__}, not a function")
    return hook  # type: ignore[no-any-return]


def apply_hook(hook: Callable[[dict[str, Any]], Record], record: dict[str, Any]) -> Record:
    """The hook's answer for one record. Whatever it raises is a :class:`Fault` of that record."""
    try:
        out = hook(record)
    except Exception as error:
        raise Fault(f"data.formatting raised {type(error).__name__}: {error}") from error
    if not isinstance(out, Mapping):
        raise Fault(f"data.formatting must return a dict in one of the formats, got {type(out).__name__}")
    return out


def names_of(record: Record) -> str:
    """The columns of a record, for messages."""
    return ", ".join(map(str, record)) or "no columns"


def first_of(record: Record, *names: str) -> Any:
    """The value of the first of the columns that a record has, or None."""
    return next((record[n] for n in names if n in record), None)


def turn_list(value: Any, column: str) -> list[Turn]:
    """Turns as `from`/`value` or `role`/`content` objects, also nested one list deep."""
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list):
        raise Fault(f"{column} must be a list of turns, got {type(value).__name__}")
    turns = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise Fault(f"turn {number} must be an object with from and value, got {type(item).__name__}")
        role, content = first_of(item, "from", "role"), first_of(item, "value", "content")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Fault(f"turn {number} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        turns.append(Turn(ROLES[role.lower()], text_in(content, f"turn {number}")))
    return turns


def text_in(value: Any, what: str) -> str:
    """A value that must be a text which tokenizers take. Raises :class:`Fault`."""
    if not isinstance(value, str):
        raise Fault(f"{what} must be a string, got {'nothing' if value is None else type(value).__name__}")
    bad = _BAD_CHARACTERS.search(value)
    if bad:
        name = "a NUL byte" if bad[0] == "\0" else "a lone surrogate"
        raise Fault(f"{what} holds {name} at character {bad.start() + 1}")
    return value


def _conversations(record: Record) -> list[Turn]:
    column = "conversations" if "conversations" in record else "conversation"
    return turn_list(record[column], column)


def _messages(record: Record) -> list[Turn]:
    return turn_list(record["messages"], "messages")


def _prompt_completion(record: Record) -> list[Turn]:
    prompt, completion = record["prompt"], first_of(record, "completion", "response")
    head = turn_list(prompt, "prompt") if isinstance(prompt, list) else [Turn("user", text_in(prompt, "prompt"))]
    if isinstance(completion, list):
        return head + turn_list(completion, "completion")
    return [*system_turns(record), *head, Turn("assistant", text_in(completion, "completion"))]


def _instruction(record: Record) -> list[Turn]:
    answer = text_in(first_of(record, "output", "response"), "output")
    return [*instruction_turns(record), Turn("assistant", answer)]


def instruction_turns(record: Record) -> list[Turn]:
    """What an Alpaca record asks, its system text first."""
    ask = text_in(record["instruction"], "instruction")
    more = record.get("input")
    if more is not None and text_in(more, "input").strip():
        ask = f"{ask}\n\n{more}"
    return [*system_turns(record), Turn("user", ask)]


def system_turns(record: Record) -> list[Turn]:
    """The turn of the column `system`, or none."""
    text = record.get("system")
    return [Turn("system", text_in(text, "system"))] if text else []


def _text(record: Record) -> list[Turn]:
    return [Turn("text", text_in(record["text"], "text"))]


def _checked_text(turns: list[Turn]) -> Conversation:
    if not turns[0].content.strip():
        raise Fault("text is empty")
    return tuple(turns)


def checked_chat(turns: list[Turn]) -> Conversation:
    """The rules for turns: an optional system turn, then user and assistant in turn."""
    if not turns:
        raise Fault("the conversation is empty")
    start = 1 if turns[0].role == "system" else 0
    body = turns[start:]
    for position, turn in enumerate(body):
        number, wanted = start + position + 1, "assistant" if position % 2 else "user"
        if turn.role != wanted:
            raise Fault(f"turn {number} is of the {turn.role} where one of the {wanted} must stand")
        if turn.role == "user" and not turn.content.strip():
            raise Fault(f"turn {number} (user) is empty")
    if body and body[-1].role == "user":
        body = body[:-1]
    responses = [t for t in body if t.role == "assistant"]
    if not responses:
        raise Fault("there is no assistant turn to learn from")
    if not any(t.content.strip() for t in responses):
        raise Fault("every assistant turn is empty")
    system = [t for t in turns[:1] if t.role == "system" and t.content.strip()]
    return (*system, *body)


COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "conversations": (("conversations", "conversation"),),
    "messages": (("messages",),),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "instruction": (("instruction",), ("output", "response")),
    "text": (("text",),),
}
_PARSERS: dict[str, Callable[[Record], list[Turn]]] = {
    "conversations": _conversations,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "text": _text,
}
