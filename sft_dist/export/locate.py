"""What a SOURCE is, where the models lie that it stands on, and the run that it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_dist import builtin_models
from sft_dist.checkpoints import folder as folders
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe

FSDP = "pytorch_model_fsdp_0"
Kind = Literal["model", "adapter", "checkpoint", "zero", "fsdp"]


@dataclass(frozen=True)
class Source:
    """A folder of weights, in what form they are, and the folder and recipe of the run around it, if any."""

    kind: Kind
    folder: Path
    run: Path | None
    recipe: Recipe | None

    @property
    def beside(self) -> list[Path]:
        """Folders whose configuration and tokenizer are those of the weights, the nearest first."""
        return [self.folder] if self.run is None else [self.folder, self.run / "model"]


def locate(name: str) -> Source:
    """The weights behind a run's folder, a checkpoint, a model or adapter directory or a hub id in the cache.

    Raises :class:`UserError`.
    """
    folder = local_folder(name, None, "SOURCE")
    inner = folder / "model"
    if not _has_weights(folder) and _has_weights(inner):
        folder = inner
    if not _has_weights(folder):
        newest = _newest(folder / "checkpoints")
        mend = f"name one of its checkpoints, such as {newest}" if newest else "name a folder that is"
        raise UserError(f"{folder}: neither a model, an adapter nor a checkpoint; {mend}")
    whole = folder.resolve()
    run = next((up for up in list(whole.parents)[:2] if (up / "recipe.yaml").is_file()), None)
    return Source(_kind(folder), folder, run, _recipe(run))


def local_folder(name: str, revision: str | None, key: str) -> Path:
    """The folder of a model on this machine; `key` is who named it. Raises :class:`UserError`."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if builtin_models.is_built_in(name):
        return Path(builtin_models.resolve(name))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        mend = "name its folder by --base" if key != "SOURCE" else "name a folder"
        raise UserError(f"{key}: {name} is neither a folder nor a model in this machine's cache; {mend}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises :class:`UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or not JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object of JSON; copy the file again")
    return content


def _has_weights(folder: Path) -> bool:
    names = ("config.json", "adapter_config.json", "latest", FSDP)
    if any((folder / name).exists() for name in names) or any(folder.glob("global_step*")):
        return True
    return folders.is_checkpoint(folder)


def _newest(folder: Path) -> Path | None:
    """A checkpoint to name: the newest complete one, else one of another format."""
    if held := folders.complete(folder):
        return folders.path_of(folder, max(held))
    named = (path for path in folder.glob("checkpoint-*") if _has_weights(path))
    return max(named, key=folders.step_of, default=None)


def _kind(folder: Path) -> Kind:
    if folders.is_checkpoint(folder):
        return "checkpoint"
    if (folder / "latest").exists() or any(folder.glob("global_step*")):
        return "zero"
    if (folder / FSDP).exists():
        return "fsdp"
    own = any(folder.glob("model*.safetensors*"))
    return "adapter" if (folder / "adapter_config.json").exists() and not own else "model"


def _recipe(run: Path | None) -> Recipe | None:
    if run is None:
        return None
    try:
        return load_recipe(run / "recipe.yaml")
    except UserError:
        # Of another version, or with files that are gone: what it could tell is then asked for.
        return None
