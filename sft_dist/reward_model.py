"""A trained reward model, whole or an adapter with its head: loading it, and its rewards for tokens.

transformers reads the reward off the last token that is not the pad token, whatever the padding. So the pad token must
be none that ends an answer, or the reward would be read off the token before the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft_dist import builtin_models
from sft_dist.config import ModelSection
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.heads import SCORE
from sft_dist.models import load_config, load_model, row_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADAPTER = "adapter_config.json"


def settle_pad_token(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int], say: Callable[[str], None]
) -> None:  # fmt: skip
    """Have a pad token that is none of the tokens `ends`, in place, where the vocabulary has a special one to spare."""
    if tokenizer.pad_token_id not in ends:
        return
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    other = next((str(t) for t in special if tokenizer.convert_tokens_to_ids(str(t)) not in ends), None)
    if other is None:
        say(f"pad token: {tokenizer.pad_token} ends answers, too; the reward is read off the token before it")
        return
    say(f"pad token: {tokenizer.pad_token} ends answers, so {other} takes its place; the reward is read off the end")
    tokenizer.pad_token = other


@dataclass(frozen=True)
class RewardModel:
    """A reward model with its tokenizer. `limit`: tokens of the longest text, None for no limit."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    limit: int | None

    @torch.no_grad()
    def rewards(self, rows: Sequence[Sequence[int]], batch_size: int = 8) -> list[float]:
        """The reward of each row of token ids, in their order; rows of like length share a batch."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = torch.full((len(part), len(rows[part[0]])), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, number in enumerate(part):
                ids[place, : len(rows[number])] = torch.tensor(list(rows[number]))
                mask[place, : len(rows[number])] = 1
            device = self.model.device
            out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for number, reward in zip(part, out.logits.squeeze(-1).float().tolist(), strict=True):
                found[number] = reward
        return found


def load_reward_model(name: str, section: ModelSection | None = None) -> RewardModel:
    """The reward model of a folder or hub id, or the adapter with its head in a folder, put on its base.

    In evaluation mode, on the GPU where there is one. Raises :class:`UserError`.
    """
    path = builtin_models.resolve(name)
    section = section or ModelSection(model_name_or_path=path)
    tokenizer = load_tokenizer(path, section, _silent)
    if (Path(path) / _ADAPTER).is_file():
        model = _with_adapter(Path(path), section, tokenizer)
    else:
        refuse_headless(path, section)
        model = load_model(path, section, tokenizer, head="reward")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return RewardModel(model, tokenizer, row_length(model.config, None))


def _with_adapter(path: Path, section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    from peft import PeftModel

    held = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))
    if held.get("task_type") != "SEQ_CLS" or SCORE not in (held.get("modules_to_save") or []):
        raise UserError(f"{path}: an adapter without a head, which gives no rewards; name that of a reward run")
    # Of the adapter are only its own files; the base may be a causal language model, whose head is then drawn and put
    # aside by the adapter's.
    base = load_model(builtin_models.resolve(held["base_model_name_or_path"]), section, tokenizer, head="reward")
    return PeftModel.from_pretrained(base, path)


def refuse_headless(path: str, section: ModelSection) -> None:
    """Raise :class:`UserError` for a model that has no head of one label."""
    config = load_config(path, section)
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise UserError(f"{path}: no reward model ({', '.join(names) or 'unnamed'}); name one of a run of stage reward")
    if config.num_labels != 1:
        raise UserError(
            f"{path}: a classifier of {config.num_labels} labels, where a reward model has one; name another"
        )


def _silent(_: str) -> None:
    return None
