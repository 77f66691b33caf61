"""The command's work: find out what SOURCE is, plan the output, and write it under another name until it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_dist.errors import UserError
from sft_dist.export import companions, plan
from sft_dist.export.checkpoint import checkpoint_tensors
from sft_dist.export.dcp import distributed_tensors
from sft_dist.export.locate import FSDP, Source, local_folder, locate, read_json
from sft_dist.export.lora import Adapter, is_adapter, read_adapter
from sft_dist.export.tensors import Tensors, stored
from sft_dist.export.writer import check_space, write
from sft_dist.export.zero import zero_tensors
from sft_dist.heads import Head

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for. `file_bytes`: of an output file at most; `base`: in the adapter's stead."""

    dtype: torch.dtype | None = None
    base: str | None = None
    keep_adapter: bool = False
    file_bytes: int = 5 * 10**9


def export(name: str, output: Path, wishes: Wishes, say: Say = print) -> None:
    """Write the model of a SOURCE into a new folder. Raises :class:`UserError`, and then nothing is left behind."""
    refuse_occupied(output)
    source = locate(name)
    tensors = open_tensors(source)
    if source.kind == "adapter" or is_adapter(tensors):
        adapter = _adapter(source, tensors)
        (_keep if wishes.keep_adapter else _merge)(source, adapter, output, wishes, say)
    elif wishes.keep_adapter or wishes.base:
        option = "--keep-adapter" if wishes.keep_adapter else "--base"
        raise UserError(f"{option}: {source.folder} is no adapter; leave the option out")
    else:
        _convert(source, tensors, output, wishes, say)


def open_tensors(source: Source) -> Tensors:
    """The tensors of a source, none of them read. Raises :class:`UserError`."""
    if source.kind == "checkpoint":
        return checkpoint_tensors(source.folder)
    if source.kind == "zero":
        return zero_tensors(source.folder)
    if source.kind == "fsdp":
        return distributed_tensors(source.folder / FSDP)
    return stored(source.folder, "adapter_model" if source.kind == "adapter" else "model")


def refuse_occupied(output: Path) -> None:
    """Raises :class:`UserError` where the output folder is a file or holds anything."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"--output: {output} is not a folder; name one that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; name a folder that does not exist yet")


@contextmanager
def finished_as(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well, and is gone when it does not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror}; name another folder") from error
    try:
        yield folder
        refuse_occupied(output)
        # The system replaces an empty folder by one of another name, and no other.
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _convert(source: Source, tensors: Tensors, output: Path, wishes: Wishes, say: Say) -> None:
    folder = companions.config_folder(source)
    if source.kind == "model":
        companions.refuse_quantised(folder, "name a model with plain weights")
        made = plan.plain(tensors, wishes.dtype, _blank_if_known(folder, plan.head_of(tensors)), source.folder)
    else:
        made = plan.fitted(tensors, wishes.dtype, folder, source.folder)
    _write_model(source, folder, made, output, wishes, say)


def _merge(source: Source, adapter: Adapter, output: Path, wishes: Wishes, say: Say) -> None:
    name = wishes.base or adapter.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter.origin}: the adapter names no base; name it by --base")
    key = "--base" if wishes.base else f"{adapter.origin}: base_model_name_or_path"
    folder = local_folder(name, None if wishes.base else adapter.config.get("revision"), key)
    companions.refuse_quantised(folder, "name the model that was quantised by --base")
    if source.recipe is not None and source.recipe.peft.load_in_4bit:
        say(f"the adapter was trained over 4-bit weights and is merged onto the unquantised {name}")
    made = plan.merged(stored(folder), adapter, wishes.dtype, folder)
    if made.settings.get("tie_word_embeddings") is False:
        say("embeddings and head, one weight in the base, are two in the output: the adapter tells them apart")
    _write_model(source, folder, made, output, wishes, say)


def _keep(source: Source, adapter: Adapter, output: Path, wishes: Wishes, say: Say) -> None:
    made = plan.adapter_alone(adapter, wishes.dtype)
    with finished_as(output) as unfinished:
        check_space(made.tensors, unfinished)
        # peft reads an adapter from one file.
        write(made.tensors, unfinished, sum(t.bytes for t in made.tensors) + 1, "adapter_model")
        companions.copy_adapter_config(adapter.config, wishes.base, unfinished)
        companions.write_tokenizer(source, None, unfinished, say)
    say(f"{output}: the adapter, {len(made.tensors)} tensors")


def _write_model(source: Source, folder: Path, made: plan.Plan, output: Path, wishes: Wishes, say: Say) -> None:
    with finished_as(output) as unfinished:
        check_space(made.tensors, unfinished)
        base = None if folder in source.beside else folder
        companions.write_config(source, folder, made, unfinished)
        companions.write_tokenizer(source, base, unfinished, say)
        if plan.head_of(tensor.name for tensor in made.tensors) == "causal":
            companions.write_generation(source, base, unfinished)
        else:
            companions.write_pad_token(unfinished)
        files = write(made.tensors, unfinished, wishes.file_bytes)
    size = sum(tensor.bytes for tensor in made.tensors)
    many = "1 file" if files == 1 else f"{files} files"
    say(f"{output}: {len(made.tensors)} tensors, {size / 1e9:.3g} GB in {many}")


def _blank_if_known(folder: Path, head: Head) -> Any | None:
    try:
        return plan.blank_model(folder, head=head)
    except UserError:
        # Code of the model's own is not run; its tensors can be copied all the same.
        return None


def _adapter(source: Source, tensors: Tensors) -> Adapter:
    file = next((f / "adapter_config.json" for f in source.beside if (f / "adapter_config.json").is_file()), None)
    config = read_json(file) if file else _config_of_recipe(source, tensors)
    return read_adapter(tensors, config, source.folder, whole_model=source.kind == "zero")


def _config_of_recipe(source: Source, tensors: Tensors) -> dict[str, Any]:
    """What peft would have written: a checkpoint has no adapter_config.json, a run does at its end."""
    from sft_dist.adapters import lora_config

    config = lora_config(source.recipe.peft, plan.head_of(tensors)) if source.recipe is not None else None
    base = companions.trained_base(source)
    if config is None or base is None:
        raise UserError(f"{source.folder}: no adapter_config.json and no recipe.yaml; copy adapter_config.json here")
    modules = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors if ".lora_" in key})
    config.target_modules, config.base_model_name_or_path, config.inference_mode = modules, str(base), True
    # Through JSON, so that it is what would have been read from a file.
    content: dict[str, Any] = _plain(config.to_dict())
    return content


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", None) or list(other)))
