"""What lies beside the weights: configuration, settings of generation, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft_dist import builtin_models
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.export.locate import Source, local_folder, read_json
from sft_dist.export.plan import Plan
from sft_dist.export.tensors import FLOATS

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_MARKS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def trained_base(source: Source) -> Path | None:
    """The folder of the model that the run of a checkpoint began with, by its recipe."""
    if source.recipe is None:
        return None
    model = source.recipe.model
    name = builtin_models.resolve(model.model_name_or_path)
    return local_folder(name, model.model_revision, f"{source.run}/recipe.yaml: model.model_name_or_path")


def config_folder(source: Source) -> Path:
    """The folder whose config.json is that of a source's weights. Raises :class:`UserError`."""
    for folder in source.beside:
        if (folder / "config.json").is_file():
            return folder
    base = trained_base(source)
    if base is None or not (base / "config.json").is_file():
        raise UserError(
            f"{source.folder}: no config.json here or in the run's model/, and no recipe.yaml that names the model; "
            "copy the model's config.json here"
        )
    return base


def refuse_quantised(folder: Path, mend: str) -> None:
    """Raises :class:`UserError` where a folder's weights are quantised."""
    if read_json(folder / "config.json").get("quantization_config"):
        raise UserError(f"{folder}: its weights are quantised; {mend}")


def write_config(source: Source, folder: Path, plan: Plan, output: Path) -> None:
    """config.json with the type that most of the weights have, and what the plan has to say."""
    config = read_json(folder / "config.json")
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.dtype in FLOATS:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.bytes
    config.pop("torch_dtype", None)
    text = config.get("text_config")
    if sizes:
        config["dtype"] = sizes.most_common(1)[0][0]
        if isinstance(text, dict):
            text.pop("torch_dtype", None)
            text["dtype"] = config["dtype"]
    if source.kind in ("checkpoint", "zero", "fsdp") and config.get("use_cache") is False:
        # Switched off for the training only.
        del config["use_cache"]
    for key, value in plan.settings.items():
        inner = key == "vocab_size" and key not in config and isinstance(text, dict)
        (config["text_config"] if inner else config)[key] = value
    _write_json(output / "config.json", config)


def write_tokenizer(source: Source, base: Path | None, output: Path, say: Callable[[str], None]) -> None:
    """The files of the tokenizer that the training left; or of the base's, with the template of the recipe."""
    for folder in source.beside:
        if any((folder / mark).is_file() for mark in _MARKS):
            _copy(folder, _TOKENIZER, output)
            return
    base = base or trained_base(source)
    if base is None:
        say("no tokenizer: none lies beside the weights")
    elif source.recipe is not None:
        _save_tokenizer(source.recipe, base, output)
    else:
        _copy(base, _TOKENIZER, output)


def write_generation(source: Source, base: Path | None, output: Path) -> None:
    """generation_config.json as the training left it; or the base's, with the tokens that end a trained answer."""
    for folder in source.beside:
        if (folder / "generation_config.json").is_file():
            _copy(folder, ("generation_config.json",), output)
            return
    base = base or (trained_base(source) if source.kind != "model" else None)
    if base is None or not (base / "generation_config.json").is_file():
        return
    settings = read_json(base / "generation_config.json")
    if source.recipe is not None:
        settings["eos_token_id"] = _stop_tokens(output)
    _write_json(output / "generation_config.json", settings)


def write_pad_token(output: Path) -> None:
    """The pad token of a reward model's tokenizer, in its configuration: it tells where a text ends."""
    if any((output / mark).is_file() for mark in _MARKS):
        config = read_json(output / "config.json")
        config["pad_token_id"] = _tokenizer_in(output).pad_token_id
        _write_json(output / "config.json", config)


def copy_adapter_config(config: dict[str, Any], base: str | None, output: Path) -> None:
    """adapter_config.json, with another base where one was named."""
    _write_json(output / "adapter_config.json", {**config, **({"base_model_name_or_path": base} if base else {})})


def _save_tokenizer(recipe: Recipe, base: Path, output: Path) -> None:
    from sft_dist.data.template import load_template, stop_token_ids
    from sft_dist.data.tokenizer import load_tokenizer
    from sft_dist.reward_model import settle_pad_token

    section = recipe.model.model_copy(update={"model_name_or_path": str(base)})
    tokenizer = load_tokenizer(str(base), section, lambda _: None)
    template = load_template(tokenizer, recipe.data)
    if recipe.stage == "reward":
        settle_pad_token(tokenizer, stop_token_ids(template), lambda _: None)
    tokenizer.save_pretrained(output)


def _stop_tokens(folder: Path) -> list[int]:
    from sft_dist.config import DataSection
    from sft_dist.data.template import load_template, stop_token_ids

    return stop_token_ids(load_template(_tokenizer_in(folder), DataSection(dataset_name="none")))


def _tokenizer_in(folder: Path) -> Any:
    from sft_dist.config import ModelSection
    from sft_dist.data.tokenizer import load_tokenizer

    return load_tokenizer(str(folder), ModelSection(model_name_or_path=str(folder)), lambda _: None)


def _copy(folder: Path, names: Sequence[str], output: Path) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, output / name)
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
