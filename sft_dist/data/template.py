"""Chat templates: a conversation as one text, with the character spans of its responses.

The spans come from rendering the conversation a second time with a placeholder for every response: what
stands around the placeholders is the template's own text, and what stands between the same texts in the
real rendering is the response. That holds for any Jinja template, with or without `{% generation %}`, and
however the response marker happens to tokenize.

A model without a template (OPT, GPT-2, a base Llama) is given the plain one below, as an ordinary chat
template on its tokenizer, so that everything that reads the saved model later uses the same text:

    ### Instruction:
    {user}

    ### Response:
    {assistant}{eos}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config import DataSection
from sft_dist.data.formats import Conversation, Fault, Turn
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION_TEMPLATE = "### Instruction:\n"
RESPONSE_TEMPLATE = "### Response:\n"
# Text of a private-use plane: no template looks for it and no trimming touches it.
_PLACEHOLDER = "\U000f5d01{}\U000f5d02"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; `spans` are the character ranges (start, end) that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    append_eos: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template and what it writes around a response.

    `opening`: what the generation prompt adds before a response (may be empty).
    `closing`: what ends a response, up to and with the token that stops generation (may be empty).
    `append_eos`: the template writes no such token, so the eos token is added to the row's end.
    `origin`: where the template came from, for people.
    """

    tokenizer: PreTrainedTokenizerBase
    opening: str
    closing: str
    append_eos: bool
    origin: str

    def render(self, turns: Conversation) -> Rendered:
        """The text of a conversation and the spans of its responses. Raises :class:`Fault`."""
        if turns[0].role == "text":
            return Rendered(turns[0].content, ((0, len(turns[0].content)),), append_eos=True)
        text = _apply(self.tokenizer, _messages(turns))
        return self._located(turns, text, _apply(self.tokenizer, _messages(_marked(turns))))

    def render_all(self, conversations: Sequence[Conversation]) -> list[Rendered | Fault]:
        """`render` of each conversation, or the fault that it raised."""
        if any(turns[0].role == "text" for turns in conversations):
            return [self._rendered(turns) for turns in conversations]
        try:
            texts = _apply_all(self.tokenizer, [_messages(turns) for turns in conversations])
            marked = _apply_all(self.tokenizer, [_messages(_marked(turns)) for turns in conversations])
        except Fault:
            # One by one, to find out which.
            return [self._rendered(turns) for turns in conversations]
        found: list[Rendered | Fault] = []
        for turns, text, skeleton in zip(conversations, texts, marked, strict=True):
            try:
                found.append(self._located(turns, text, skeleton))
            except Fault as fault:
                found.append(fault)
        return found

    def _rendered(self, turns: Conversation) -> Rendered | Fault:
        try:
            return self.render(turns)
        except Fault as fault:
            return fault

    def _located(self, turns: Conversation, text: str, marked: str) -> Rendered:
        """Find the responses in `text`; `marked` is the same conversation with a placeholder for each of them."""
        responses = [t.content for t in turns if t.role == "assistant"]
        literals = _literals(marked, len(responses))
        spans = []
        position = 0
        for number, response in enumerate(responses):
            start = _expect(text, literals[number], position)
            end = _response_end(text, start, response, literals[number + 1])
            closed = end + (len(self.closing) if text.startswith(self.closing, end) else 0)
            spans.append((start - self._lead(literals[number]), closed))
            position = end
        if text[position:] != literals[-1]:
            raise Fault("the chat template rewrites this conversation, so that its responses cannot be told apart")
        return Rendered(text, tuple(spans), self.append_eos)

    def prompt(self, turns: Conversation) -> str:
        """The text that a model is given to answer the last turn of `turns`."""
        return _apply(self.tokenizer, _messages(turns), add_generation_prompt=True)

    def _lead(self, literal: str) -> int:
        """Characters before a response that the model itself has to write.

        Behind the generation prompt that is what the template adds (Qwen3's empty think block); without a
        generation prompt it is the space between `[/INST]` and the answer.
        """
        if not self.opening:
            return len(literal) - len(literal.rstrip())
        found = literal.rfind(self.opening)
        return 0 if found < 0 else len(literal) - found - len(self.opening)


def load_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> ChatTemplate:
    """Settle the template of a tokenizer by the recipe and find what it writes around responses.

    Sets `tokenizer.chat_template` where the recipe or the lack of a template asks for it.
    Raises :class:`DataError` when the template cannot be used.
    """
    origin = _settle(tokenizer, data)
    probe = (Turn("user", "a"), Turn("assistant", "b"))
    try:
        asked = _apply(tokenizer, _messages(probe[:1]))
        prompt = _apply(tokenizer, _messages(probe[:1]), add_generation_prompt=True)
        tail = _literals(_apply(tokenizer, _messages(_marked(probe))), 1)[1]
    except Fault as fault:
        raise DataError(f"{_key(data)}: {fault}; give another template in data.chat_template_path") from fault
    opening = prompt[len(asked) :] if prompt.startswith(asked) else ""
    closing, has_stop = _closing(tokenizer, tail)
    return ChatTemplate(tokenizer, opening, closing, not has_stop, origin)


def _key(data: DataSection) -> str:
    return "data.chat_template_path" if data.chat_template_path else "model.model_name_or_path"


def _settle(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> str:
    if data.chat_template_path:
        path = Path(data.chat_template_path).expanduser()
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template_path: {path}: {error}; give a readable Jinja file") from error
        return str(path)
    own = data.instruction_template is not None or data.response_template is not None
    if tokenizer.chat_template and not own:
        return "the tokenizer's own chat template"
    tokenizer.chat_template = plain_template(
        INSTRUCTION_TEMPLATE if data.instruction_template is None else data.instruction_template,
        RESPONSE_TEMPLATE if data.response_template is None else data.response_template,
        adds_bos(tokenizer),
    )
    return "the recipe's instruction and response templates" if own else "the plain instruction/response template"


def plain_template(instruction: str, response: str, bos: bool) -> str:
    """The Jinja text of the plain template; `bos` begins it with the beginning-of-sequence token."""
    user, assistant = _quoted(instruction), _quoted(response)
    return (
        ("{{ bos_token }}" if bos else "")
        + "{%- for message in messages %}"
        + "{%- if message['role'] == 'user' %}{{ " + user + " + message['content'] + '\\n\\n' }}"
        + "{%- elif message['role'] == 'assistant' %}{{ " + assistant + " + message['content'] + eos_token }}"
        + "{%- if not loop.last %}{{ '\\n\\n' }}{%- endif %}"
        + "{%- else %}{{ message['content'] + '\\n\\n' }}{%- endif %}"
        + "{%- endfor %}"
        + "{%- if add_generation_prompt %}{{ " + assistant + " }}{%- endif %}"
    )  # fmt: skip


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its bos token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def stop_token_ids(template: ChatTemplate) -> list[int]:
    """The tokens that end a response: the template's own and the tokenizer's eos token."""
    ids = template.tokenizer(template.closing, add_special_tokens=False)["input_ids"] if template.closing else []
    return sorted({i for i in (*ids[-1:], template.tokenizer.eos_token_id) if i is not None})


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _messages(turns: Conversation) -> list[dict[str, str]]:
    return [{"role": t.role, "content": t.content} for t in turns]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    with _refusals():
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _apply_all(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]) -> list[str]:
    if not conversations:
        return []
    with _refusals():
        return list(map(str, tokenizer.apply_chat_template(conversations, tokenize=False)))


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template raises, as a fault of the record. Expressions in a template may fail as Python's do."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise Fault(f"the chat template refuses it: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Fault(f"the chat template fails on it: {type(error).__name__}: {error}") from error


def _marked(turns: Conversation) -> Conversation:
    """The conversation with a placeholder for every response."""
    number = itertools.count()
    return tuple(Turn(t.role, _PLACEHOLDER.format(next(number))) if t.role == "assistant" else t for t in turns)


def _literals(marked: str, responses: int) -> list[str]:
    """The template's own text before, between and after the responses: `responses` + 1 pieces."""
    rest, pieces = marked, []
    for number in range(responses):
        before, found, rest = rest.partition(_PLACEHOLDER.format(number))
        if not found:
            raise Fault("the chat template leaves out a response")
        pieces.append(before)
    return [*pieces, rest]


def _expect(text: str, literal: str, position: int) -> int:
    if not text.startswith(literal, position):
        raise Fault("the chat template changes its own text with the response, so that no mask can be made")
    return position + len(literal)


def _response_end(text: str, start: int, response: str, following: str) -> int:
    """Where a response ends: as it was given, trimmed by the template, or else rewritten by it."""
    for form in (response, response.strip(), response.rstrip(), response.lstrip()):
        if text.startswith(form, start) and text.startswith(following, start + len(form)):
            return start + len(form)
    end = text.find(following, start) if following else len(text)
    if end < 0 or (following and text.find(following, end + 1) >= 0):
        raise Fault("the chat template rewrites a response, and its end cannot be told")
    return end


def _closing(tokenizer: PreTrainedTokenizerBase, tail: str) -> tuple[str, bool]:
    """What ends a response in `tail`, the text after the last one, and whether it holds a stop token."""
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    found = [(at, token) for token in specials if token and (at := tail.find(token)) >= 0]
    if not found:
        return tail.rstrip(), False
    at, token = min(found, key=lambda f: (f[0], -len(f[1])))
    return tail[: at + len(token)], True
