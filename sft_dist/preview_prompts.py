"""Prompts in a preview, and a sample of them, with the rewards, checked before a run (see `sft_dist.preview`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft_dist.config import DataSection, Recipe
from sft_dist.data.account import Account
from sft_dist.data.conversations import read_records
from sft_dist.data.prompts import Asked, PromptReader, prompt_ids, too_long
from sft_dist.data.sources import Source
from sft_dist.data.template import ChatTemplate
from sft_dist.ppo.names import reward_names
from sft_dist.ppo.rewards import Texts, functions_of, model_rewards, refuse_other_value
from sft_dist.render.preview import PreviewRecord, TokenSpan

# The records' own answers that a reward function is tried on.
_TRIED = 8


@dataclass(frozen=True)
class Shown:
    """A prompt of a record, and its tokens."""

    where: str
    asked: Asked
    ids: list[int]


def prompt_rows(
    source: Source, data: DataSection, template: ChatTemplate, room: int | None, account: Account, limit: int
) -> Iterator[Shown]:
    """The prompts among the first `limit` good records of a source; what is left out is counted.

    `room`: tokens that a prompt may have. Raises :class:`DataError` as the preparation does.
    """
    for where, asked in read_records(source, PromptReader(data), data, account, limit):
        ids = prompt_ids(template, asked.turns)
        if room is not None and len(ids) > room:
            account.note_bad(f"{where}: {too_long(len(ids), room)}", data.max_bad_records)
            continue
        account.rows += 1
        account.tokens += len(ids)
        yield Shown(where, asked, ids)


def prompt_previews(rows: Iterator[Shown], template: ChatTemplate) -> Iterator[PreviewRecord]:
    """The prompts as the policy is given them: nothing of them is trained."""
    for row in rows:
        text = template.tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield PreviewRecord(row.where, (TokenSpan(text, False),), len(row.ids), 0, False, "prompt")


def check_rewards(recipe: Recipe, template: ChatTemplate, path: str, rows: Sequence[Shown]) -> Iterator[str]:
    """Look at the rewards of a recipe, and try its functions on the records' own answers. Yields lines for people.

    `path`: of the policy. Raises :class:`UserError`.
    """
    tried = [row for row in rows if row.asked.answer][:_TRIED] or list(rows[:_TRIED])
    texts = Texts(
        turns=[row.asked.turns for row in tried],
        completions=[row.asked.answer for row in tried],
        prompt_ids=[row.ids for row in tried],
        completion_ids=[[] for _ in tried],
        wheres=[row.where for row in tried],
    )
    for function in functions_of(recipe.ppo):
        given = function(texts)
        what = "the records' own answers" if tried[0].asked.answer else "responses without a word"
        about = f"from {min(given):.4g} to {max(given):.4g} for {what}"
        yield f"{function.name.key}: {function.name.source} gives {about}"
    for reward in model_rewards(recipe, template.tokenizer, path):
        how = "the text anew" if reward.tokenizer is not None else "the policy's tokens"
        yield f"{reward.name.key}: {reward.name.source} is a reward model, and is given {how}"
    refuse_other_value(recipe, template.tokenizer)
    if len(names := reward_names(recipe.ppo)) > 1:
        yield f"ppo.rewards: the sum of {', '.join(f'{one.weight:g} x {one.name}' for one in names)}"
