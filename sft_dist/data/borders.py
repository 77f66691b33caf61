"""Where tokens end in the text that they were made of, without asking the tokenizer for every offset.

A byte-level BPE tokenizer cuts the UTF-8 bytes of a text into pieces and loses none, so that the length of each
token in bytes, known from the vocabulary, gives all borders by a sum. That is shown from the tokenizer's parts;
where it cannot be shown for a tokenizer there is no table, and tokens of which it cannot be shown are marked.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNSURE = -1
# The letter by which byte-level alphabets write a space.
_SPACE = "\u0120"
_CUTTING = {"Split", "Digits", "Punctuation", "ByteLevel"}


class ByteLengths:
    """`table[id]` is the length of a token in bytes, int32, or `UNSURE`.

    `nfc`: the text is normalized first, so that the table holds for normalized texts only.
    `trims`: the tokenizer's own offsets leave out spaces at the ends of tokens; the table marks the tokens for which
    that would make a difference, except white space at the very start of a text.
    """

    def __init__(self, table: NDArray[np.int32], nfc: bool, trims: bool) -> None:
        self.table, self.nfc, self.trims = table, nfc, trims


def byte_lengths(backend: Tokenizer) -> ByteLengths | None:
    """The table of a tokenizer, or None where it is not shown that tokens are pieces of the text's bytes."""
    config = json.loads(backend.to_str())
    model = config["model"]
    if not (_is_plain_bpe(model) and _cuts_only(config["pre_tokenizer"])):
        return None
    normalizer = config["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    trims = any(p["type"] == "ByteLevel" and p.get("trim_offsets", True) for p in _parts(config["post_processor"]))
    table = _table(model["vocab"], config["added_tokens"], trims)
    # Bytes that the vocabulary lacks become the unknown token, if there is one; else they are lost, and as nothing
    # adds a byte, the sum over the text tells.
    if model.get("unk_token") is not None:
        table[model["vocab"][model["unk_token"]]] = UNSURE
    return ByteLengths(table, normalizer is not None, trims)


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model.get("type") == "BPE" and not any(model.get(key) for key in odd)


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None:
        return []
    inner = processor.get("pretokenizers", processor.get("processors"))
    return [processor] if inner is None else [part for p in inner for part in _parts(p)]


def _cuts_only(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether it cuts the text into pieces, adds and removes nothing, and maps bytes to letters at last."""
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1]["type"] != "ByteLevel" or any(p["type"] not in _CUTTING for p in parts):
        return False
    return not any(p.get("add_prefix_space") or p.get("behavior") == "Removed" for p in parts)


def _table(vocab: dict[str, int], added: list[dict[str, Any]], trims: bool) -> NDArray[np.int32]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = set(ByteLevel.alphabet())
    size = max([*vocab.values(), *(entry["id"] for entry in added)]) + 1
    table = np.full(size, UNSURE, np.int32)
    for token, number in vocab.items():
        if token and letters.issuperset(token) and not (trims and token.rstrip(_SPACE) not in ("", token)):
            table[number] = len(token)
    for entry in added:
        content, number = entry["content"], entry["id"]
        length = len(content.encode())
        ragged = trims and content != content.strip().strip(_SPACE)
        # Merges may make the same word of the vocabulary, and then it stands for as many bytes as it has letters.
        merged = letters.issuperset(content) and len(content) != length
        table[number] = UNSURE if entry["lstrip"] or entry["rstrip"] or ragged or merged or not length else length
    return table
