"""Small tokenizers and models of the real architectures, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ChatML whose author marked the trained text.
CHATML_GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama-2: no generation prompt, contents trimmed, the system text inside the first question.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n'"
    " if loop.index0 == 0 and system else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital.",
    "def add(a, b):\n    return a + b\n\n### Instruction:\n\n### Response:\nuser assistant system [INST] [/INST]",
    "It returns a list of strings; use json.dumps(value) to write it. Numbers: 0 1 2 3 4 5 6 7 8 9, 10, 2024.",
]


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2 and SmolLM2, with ChatML's tokens."""
    return _wrapped(_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), template, bos_token="<|im_start|>",
                    eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of OPT: begins every text with </s>, trims the offsets, has no template."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)]),
        ]
    )
    return _wrapped(tokenizer, None, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def llama_tokenizer(template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """In the manner of Llama: SentencePiece's space in front of every text, bytes as a fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _wrapped(tokenizer: Tokenizer, template: str | None, **names: Any) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def save_model(
    folder: Path, architecture: str = "llama", layers: int = 2, seed: int = 0, activation: str = "relu"
) -> Path:
    """A model directory of a small random model with its tokenizer. Architectures: llama, opt.

    `activation` is OPT's. Comparisons of two paths take a smooth one, "gelu" (docs/parity.md).
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    tokenizer = opt_tokenizer() if architecture == "opt" else chat_tokenizer()
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": layers,
                            "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if architecture == "opt":
        config = OPTConfig(**size, **ids, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0,
                           activation_function=activation)  # fmt: skip
    else:
        config = LlamaConfig(**size, **ids, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
