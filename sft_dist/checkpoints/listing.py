"""The checkpoints of a run for people to look at: which there are, in what state, and what a run would do with them.

Free of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import CheckpointSection
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from sft_dist.runlock import living


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a listing. `bytes`: on this disk; `written`: when; `trained_tokens`: over all ranks."""

    name: str
    path: str
    step: int
    state: str
    bytes: int
    fault: str | None = None
    written: str | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    world_size: int | None = None
    strategy: str | None = None
    nodes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """A run's checkpoints, by step.

    `contents_read`: whether every byte was; `alive`: the run that is going on in the folder, in words; `newest`: the
    step that a run which is resumed goes on from; `best`: the step of the best `metric`.
    """

    run: str
    contents_read: bool
    alive: str | None
    newest: int | None
    best: int | None
    metric: str | None
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(entry.bytes for entry in self.entries)


def list_checkpoints(name: str, *, contents: bool = True) -> Listing:
    """The checkpoints of a run's folder, or of its folder of checkpoints. `contents`: read every byte of them.

    Raises :class:`UserError` for a folder that is no run.
    """
    run, folder = _folders(name)
    settings = _settings(run)
    found = folders.examine(folder, contents=contents)
    sound = [each.manifest for each in found if each.state == "complete" and each.manifest is not None]
    return Listing(
        run=str(run),
        contents_read=contents,
        alive=living(run),
        newest=max((each.step for each in sound), default=None),
        best=folders.best_of(sound, settings),
        metric=settings.metric_for_best_model,
        entries=tuple(_entry(each) for each in found),
    )


def _folders(name: str) -> tuple[Path, Path]:
    path = Path(name).expanduser()
    inner = path / "checkpoints"
    if inner.is_dir() or (path / "recipe.yaml").is_file():
        return path, inner
    if path.is_dir() and (
        path.absolute().name == "checkpoints" or any(folders.step_of(each) >= 0 for each in path.iterdir())
    ):
        # "." has no name, and no parent of its own.
        return (path if path.name else path.absolute()).parent, path
    what = "holds no recipe.yaml and no checkpoints" if path.is_dir() else "is no folder"
    raise UserError(f"RUN: {path} {what}; name a run's folder")


def _settings(run: Path) -> CheckpointSection:
    try:
        return load_recipe(run / "recipe.yaml").checkpoint
    except UserError:
        # Of another version, or not there: then no metric is known to be the one that counts.
        return CheckpointSection()


def _entry(found: folders.Found) -> Entry:
    held: Manifest | None = found.manifest
    entry = Entry(
        name=found.path.name,
        path=str(found.path),
        step=found.step,
        state=found.state,
        bytes=_bytes(found.path),
        fault=found.fault,
        written=_written(found.path),
    )
    if held is None:
        return entry
    return Entry(
        **vars(entry)
        | {
            "tokens": held.tokens,
            "trained_tokens": held.trained_tokens,
            "world_size": held.world_size,
            "strategy": held.strategy,
            "nodes": held.nodes,
            "metrics": dict(held.metrics),
        }
    )


def _bytes(path: Path) -> int:
    total = 0
    for file in path.iterdir() if path.is_dir() else []:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _written(path: Path) -> str | None:
    """When the manifest was written, which is last, as ISO 8601."""
    with contextlib.suppress(OSError):
        at = (path / manifest.NAME).stat().st_mtime
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    return None
