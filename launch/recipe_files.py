"""Recipe files: the user's own, or one of those that come with the package."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path

from sft_dist.checkpoints import folder as folders
from sft_dist.errors import RecipeError

FOLDER = Path(__file__).resolve().parent / "recipes"
PIPELINE = ".pipeline.yaml"


def packaged() -> dict[str, Path]:
    """The packaged recipes by name, such as `opt-1.3b/sft`."""
    files = sorted(p for p in FOLDER.rglob("*.yaml") if not p.name.endswith(PIPELINE))
    return {str(p.relative_to(FOLDER).with_suffix("")): p for p in files}


def pipelines() -> dict[str, Path]:
    """The packaged pipelines by name."""
    return {str(p.relative_to(FOLDER)).removesuffix(PIPELINE): p for p in sorted(FOLDER.rglob(f"*{PIPELINE}"))}


def find(name: str) -> Path:
    """The file of a recipe, given by path or by the name of a packaged one. Raises :class:`RecipeError`."""
    path = Path(name).expanduser()
    known = packaged()
    if path.exists() or path.suffix in (".yaml", ".yml"):
        # The reader of recipes says what is wrong with a path.
        return path if path.exists() or str(path.with_suffix("")) not in known else known[str(path.with_suffix(""))]
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    mend = f"did you mean {near[0]}" if near else "see `sft-dist recipes` for the packaged ones"
    raise RecipeError(f"{name}: no such recipe, {mend}")


def model_folder(name: str) -> str:
    """The model behind a run's folder, a model directory, a built-in name or a hub id.

    Raises :class:`RecipeError` for a checkpoint, and for a run that has nothing else: neither is a model yet.
    """
    path = Path(name).expanduser()
    inner = path / "model"
    if (inner / "config.json").exists() or (inner / "adapter_config.json").exists():
        return str(inner)
    if folders.is_checkpoint(path):
        raise _no_model(name, "a checkpoint, not a model", path)
    if not (path / "config.json").exists() and (held := folders.complete(path / "checkpoints")):
        raise _no_model(name, "no model yet", folders.path_of(path / "checkpoints", max(held)))
    return name


def _no_model(name: str, what: str, checkpoint: Path) -> RecipeError:
    command = f"sft-dist export {shlex.quote(str(checkpoint))} --output DIR"
    return RecipeError(f"{name}: {what}; export it first: {command}")


def model_and_recipe(name: str, recipe: str | None) -> tuple[str, Path]:
    """The model to evaluate and the recipe that names its data. Raises :class:`RecipeError`."""
    model = model_folder(name)
    if recipe is not None:
        return model, find(recipe)
    own = Path(model).parent / "recipe.yaml"
    if not own.exists():
        raise RecipeError(f"{name}: no recipe.yaml beside the model; name the recipe of the data by --recipe")
    return model, own


def first_comment(path: Path) -> str:
    """What a recipe says of itself in its first line of comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    said = (line[1:].strip() for line in lines if line.startswith("#") and "$schema" not in line)
    return next(said, "")
