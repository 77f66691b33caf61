"""Loading a tokenizer, and mending what training needs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sft_dist.config import ModelSection
from sft_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What models of the field call their end, in the order they are looked for.
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")


def load_tokenizer(path: str, model: ModelSection, say: Callable[[str], None] = print) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model, with a pad and an eos token. `say` is told what was mended.

    Raises :class:`UserError` when there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.model_name_or_path: {path}: no tokenizer could be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"model.model_name_or_path: {path}: only a slow tokenizer, which gives no character offsets; "
            "save it once as a fast one (tokenizer.json)"
        )
    mend(tokenizer, say)
    return tokenizer


def mend(tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
    """Give a tokenizer the eos and pad tokens it lacks, in place, and say so.

    The pad token is never trained and never attended to, so that the eos token can serve.
    """
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None:
        known = next((name for name in _EOS_NAMES if name in vocabulary), None)
        tokenizer.add_special_tokens({"eos_token": known or "<|endoftext|>"})
        how = "found in its vocabulary" if known else "added to its vocabulary; the embeddings grow by one"
        say(f"the tokenizer has no eos token: {tokenizer.eos_token} is used ({how})")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the tokenizer has no pad token: its eos token {tokenizer.eos_token} is used")
