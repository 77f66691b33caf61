"""The small model, the records and the recipes of a verification, made from nothing but a configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, MistralConfig, OPTConfig, PreTrainedTokenizerFast

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.models import load_config
from sft_dist.shape import small_config, small_model
from sft_dist.verify.cases import CASES, EPOCHS, GLOBAL_BATCH, LEARNING_RATE, RECORDS, Case

_SEED = 7
_LENGTH = 128  # tokens of a row
_WORDS = "the quick brown fox jumps over a lazy dog and finds that nothing in the world is quite what it was".split()  # noqa: SIM905
_SHAPES: dict[str, type[Any]] = {"opt": OPTConfig, "llama": LlamaConfig, "mistral": MistralConfig}


def shape_of(recipe: Recipe | None, shape: str) -> Any:
    """The configuration to be made small: of the recipe's model, or one of the built-in shapes."""
    if recipe is None:
        return _SHAPES[shape]()
    return load_config(builtin_models.resolve(recipe.model.model_name_or_path), recipe.model)


def write_material(folder: Path, config: Any, recipe: Recipe | None) -> None:
    """Models, data and one recipe a case, under `folder`. Raises :class:`UserError` where there is no small form."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    kernel = recipe.model.attn_implementation if recipe is not None else None
    for tied in (False, True):
        small = small_config(config, vocabulary=len(tokenizer))
        _smooth(small)
        small.tie_word_embeddings = tied or bool(config.get_text_config().tie_word_embeddings)
        small.bos_token_id, small.eos_token_id, small.pad_token_id = 0, 1, 2
        try:
            model = small_model(small, kernel, _SEED)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"model.model_name_or_path: {small.model_type} has no small form here: {why}") from error
        model.save_pretrained(_model(folder, tied))
        tokenizer.save_pretrained(_model(folder, tied))
    _write_records(folder / "records.jsonl")
    for case in CASES:
        (folder / f"{case.name}.yaml").write_text(
            yaml.safe_dump(_recipe(folder, case, recipe), sort_keys=False), encoding="utf-8"
        )


def _smooth(config: Any) -> None:
    """GELU in place of ReLU, whose units flip where rounding moves an input across zero (docs/parity.md)."""
    for name in ("activation_function", "hidden_act"):
        if getattr(config, name, None) == "relu":
            setattr(config, name, "gelu")


def _model(folder: Path, tied: bool) -> Path:
    return folder / ("model-tied" if tied else "model")


def _recipe(folder: Path, case: Case, recipe: Recipe | None) -> dict[str, Any]:
    """What of the recipe makes its numbers, around the small model; the rest is set so that differences show."""
    kept: dict[str, Any] = {} if recipe is None else {
        name: getattr(recipe.train, name)
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "adam_beta1", "adam_beta2",
                     "max_grad_norm")
    }  # fmt: skip
    made: dict[str, Any] = {
        "stage": "sft",
        "model": {"model_name_or_path": str(_model(folder, case.tied))},
        "data": {"dataset_name": str(folder / "records.jsonl")},
        "train": {
            **kept,
            "max_length": _LENGTH,
            "num_train_epochs": EPOCHS,
            "learning_rate": LEARNING_RATE,
            # With less Adam makes whole steps of what is nothing but rounding (docs/parity.md).
            "adam_epsilon": 1e-4,
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "full_determinism": True,
            "report_to": [],
        },
        "parallel": {"global_batch_size": GLOBAL_BATCH},
        "peft": {"lora_dropout": 0.0, **_lora(recipe)} if "peft.use_peft=true" in case.overrides else {},
        "output": {"output_dir": str(folder / "run"), "overwrite": True},
        "eval": {"enabled": False},
    }
    if recipe is not None and recipe.model.attn_implementation:
        made["model"]["attn_implementation"] = recipe.model.attn_implementation
    return made


def _lora(recipe: Recipe | None) -> dict[str, Any]:
    if recipe is None or not recipe.peft.use_peft:
        return {}
    return recipe.peft.model_dump(exclude={"use_peft", "load_in_4bit", "lora_dropout"})


def _write_records(path: Path) -> None:
    """Conversations with very uneven numbers of trained tokens, from one to a row full."""
    draw = random.Random(_SEED)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(RECORDS):
            answer = " ".join(draw.choices(_WORDS, k=1 if number % 3 else draw.randint(4, 16)))
            turns = [{"from": "human", "value": draw.choice(_WORDS)}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"conversations": turns}) + "\n")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token: no files are needed, and any text has ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<s>", "</s>", "<pad>"]
    vocabulary = {
        token: number for number, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
