"""Text to token ids, by `tokenizers` or, where it is proven to give the same ids, by the faster `fastokens`.

`fastokens` has to give the ids of `tokenizers` for a set of awkward texts before it is used, and then, during a
preparation, for one text in `CHECK_EVERY`. `SFT_DIST_FASTOKENS=0` leaves it out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CHECK_EVERY = 50
PLAIN, FAST = "tokenizers", "fastokens"


class Encoded(NamedTuple):
    """Ids of several texts: those of text i are `ids[starts[i] : starts[i + 1]]`; int32 and int64."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]


class Encoder(Protocol):
    """What turns texts into ids, without the special tokens that a tokenizer puts around a text."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Encoded: ...


class EncoderDiffers(Exception):
    """`fastokens` gave other ids than `tokenizers`; whatever it has made is worth nothing."""


class PlainEncoder:
    """The tokenizer's own ids."""

    name = PLAIN

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Encoded:
        encodings = bare_backend(self.tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        return joined([np.array(ids, np.int32) for ids in lists])


class FastEncoder:
    """`fastokens`, compared with the tokenizer's own ids now and then. Raises :class:`EncoderDiffers`."""

    name = FAST

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import fastokens

        self.plain = PlainEncoder(tokenizer)
        self._fast: Any = fastokens.Tokenizer.from_json_str(bare_backend(tokenizer).to_str())
        self._turn = 0

    def __call__(self, texts: Sequence[str]) -> Encoded:
        encoded = self.encode(texts)
        self._turn += 1
        self.check(texts, encoded, range(self._turn % min(CHECK_EVERY, len(texts) or 1), len(texts), CHECK_EVERY))
        return encoded

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids that are not compared yet; the tokenizer's own where the other refuses a text.

        It does where the vocabulary lacks a byte, which the tokenizer leaves out.
        """
        try:
            return self.bare(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a library in Rust may panic, which is no Exception
            return self.plain(texts)

    def bare(self, texts: Sequence[str]) -> Encoded:
        """What `fastokens` says, and raises."""
        ids, starts = self._fast.encode_batch_flat(list(texts))
        return Encoded(
            np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(starts, np.uint64).astype(np.int64)
        )

    def check(self, texts: Sequence[str], encoded: Encoded, numbers: Sequence[int]) -> None:
        plain = self.plain([texts[i] for i in numbers])
        for place, number in enumerate(numbers):
            theirs = encoded.ids[encoded.starts[number] : encoded.starts[number + 1]]
            if not np.array_equal(theirs, plain.ids[plain.starts[place] : plain.starts[place + 1]]):
                raise EncoderDiffers


def choose(tokenizer: PreTrainedTokenizerBase, fast: bool = True) -> Encoder:
    """The fastest encoder that gives the tokenizer's own ids; `fast=False`: the tokenizer itself."""
    if not fast or os.environ.get("SFT_DIST_FASTOKENS") == "0" or getattr(tokenizer, "split_special_tokens", False):
        return PlainEncoder(tokenizer)
    try:
        encoder = FastEncoder(tokenizer)
        encoder.bare(["a b"])
        for text in probes(tokenizer):  # one by one, for one that is refused would take the others with it
            encoder.check([text], encoder.encode([text]), range(1))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        return PlainEncoder(tokenizer)
    return encoder


def bare_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer behind `tokenizer`, set to neither cut nor pad, as its owner sets it at each call, too."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def joined(rows: Sequence[NDArray[np.int32]]) -> Encoded:
    """Rows of ids one behind the other."""
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return Encoded(np.concatenate([np.zeros(0, np.int32), *rows]), starts)


def probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts at which tokenizers are apt to differ: white space, digits, scripts, marks, length, special tokens."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()][:64]
    texts = [*_PROBES, "A" * 3000, " " * 3000, "ab " * 3000, "é" * 1000, "x\u0301" * 500, "#" * 200 + "\n" * 200]
    return [*texts, *special, *(f"a {t} b" for t in special), *(f"{t}{t}\n{t}1" for t in special), "".join(texts)]


_PROBES = (
    *("", " ", "  ", "\n", "\n\n\n", "\t \t", "\r\n", " \n ", "a", " a", "a ", "a  b", "a\n\n  b\n", "   a   b   "),
    *("0", "12345678901234567890", "1,234.56 and 1e-9, 0x1F", "I'm you're we'll they'd IT'S don\u2019t"),
    *("é e\u0301 \u0301 \u0301\u0301a", "你好，世界。", "Ελληνικά русский", "مرحبا שלום नमस्ते", "ไทย한국어"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f", "ﬁ ① ½ Å \u212b"),
    *("\ufeffBOM\u200b\u00a0\u2003\u3000x", "\u0085\u2028\u2029", "\ufffd\U0010ffff\ue000", "\x01\x1f\x7f"),
    *("!@#$%^&*()_+-=[]{}|;':\",./<>?`~", "def f(x):\n\treturn {'a': [1, 2,\n            3]}  # done\n\n\n"),
    *("<|im_start|>user\nhi<|im_end|>\n", "</s><s>[INST] a [/INST]", "<|", "|>"),
)
