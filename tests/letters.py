"""A language of single letters: tokenizer, small random models and prompts, and rewards whose optimum is known."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghij"
NAMES = ("<pad>", "<end>", "<ask>")
# Nothing but letters and one end, so that the letters of a response are all its tokens.
PLAIN = ("<end>",)
# Longest response of the tasks, and the length that `length` asks for.
ROOM, WANTED = 12, 6
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<end>' }}{% else %}{{ '<ask>' }}{% endif %}{% endfor %}"
)


def share(prompts: list[str], completions: list[str]) -> list[float]:
    """How much of the room is the letter a; 1 at most, by a response of nothing else that does not end early."""
    return [text.count("a") / ROOM for text in completions]


def length(prompts: list[str], completions: list[str]) -> list[float]:
    """How near the length is to the one that is wanted; 1 at most."""
    return [1 - abs(len(text) - WANTED) / WANTED for text in completions]


def pattern(prompts: list[str], completions: list[str]) -> list[float]:
    """How many neighbours, out of those that have room, follow a-b-c-a; 1 at most."""
    return [sum(text[i : i + 2] in ("ab", "bc", "ca") for i in range(len(text))) / (ROOM - 1) for text in completions]


def failing(prompts: list[str], completions: list[str]) -> list[float]:
    """None, on the second process of a run."""
    if os.environ.get("RANK") == "1":
        raise LookupError("no judge")
    return [0.0] * len(completions)


def tokenizer(letters: str = LETTERS, names: Sequence[str] = NAMES) -> PreTrainedTokenizerFast:
    """A token for each letter behind those of padding, of the end of a response, and of the end of a prompt.

    Of `names` there may be one alone, which is the end of either, and padding, too.
    """
    vocabulary = [*names, *letters]
    found = Tokenizer(models.WordLevel({name: number for number, name in enumerate(vocabulary)}, unk_token=names[0]))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token=names[0])
    wrapped.chat_template = _TEMPLATE if "<ask>" in names else _TEMPLATE.replace("<ask>", "<end>")
    return wrapped


def save_model(
    folder: Path, architecture: str = "llama", seed: int = 0, names: Sequence[str] = NAMES, **more: Any
) -> Path:  # fmt: skip
    """A model directory of a small random model of the language. Architectures: llama, opt. `more`: of its config."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    words = tokenizer(names=names)
    size = {**sizes(words), **more}
    if architecture == "opt":
        config = OPTConfig(**{"ffn_dim": 96, "word_embed_proj_dim": size["hidden_size"], "dropout": 0.0,
                              "activation_function": "gelu", **size})  # fmt: skip
    else:
        config = LlamaConfig(**{"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True, **size})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sizes(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What a config of a small model of the language says."""
    # torch gives the embedding of padding no gradient, which the end has to have where it is padding, too.
    pad = None if words.pad_token_id == words.eos_token_id else words.pad_token_id
    return {"vocab_size": len(words), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": words.eos_token_id,
            "pad_token_id": pad}  # fmt: skip


def save_reward_model(folder: Path, architecture: str = "llama", seed: int = 0, **more: Any) -> Path:
    """A model directory of a small random reward model of the language, of the sizes of `save_model`."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    save_model(folder, architecture, **more)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int = 64, seed: int = 0, letters: str = LETTERS) -> Path:
    """Records `{"query": ...}` of one to six letters."""
    draw = random.Random(seed)
    queries = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(count)]
    path.write_text("".join(json.dumps({"query": query}) + "\n" for query in queries))
    return path
