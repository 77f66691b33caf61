"""The folder of a run's checkpoints: which are there, in what state, and which are kept. Free of torch.

`checkpoint-N` is complete: it gets its name last. What is being written is `checkpoint-N.unfinished`, what is being
removed `checkpoint-N.removed`; both are nothing to a reader, and are cleaned away at the next start. A complete one
that was found damaged is set aside as `checkpoint-N.damaged` and never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import CheckpointSection

UNFINISHED, REMOVED, DAMAGED = ".unfinished", ".removed", ".damaged"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT = re.compile(r"checkpoint-\d+(\.unfinished|\.removed)")


@dataclass(frozen=True)
class Found:
    """A checkpoint as it was found. `fault`: what is wrong with it, in words."""

    path: Path
    state: Literal["complete", "damaged", "unfinished"]
    manifest: Manifest | None = None
    fault: str | None = None


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def complete(folder: Path) -> dict[int, Manifest]:
    """The checkpoints whose files are all there in full size, by step; what is in the files is not read."""
    found = {}
    for step, path in _named(folder):
        with contextlib.suppress(ValueError):
            held = manifest.read(path)
            if held.step == step and manifest.size_fault(path, held) is None:
                found[step] = held
    return found


def examine(folder: Path) -> list[Found]:
    """Everything in the folder with its state, by step; every byte of the complete ones is read."""
    found = [_examined(step, path) for step, path in _named(folder)]
    for path in sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []:
        if path.suffix == UNFINISHED:
            found.append(Found(path, "unfinished", fault="was not written to its end; nothing reads it"))
        elif path.suffix == DAMAGED:
            found.append(Found(path, "damaged", fault="set aside when it was found damaged"))
    return found


def _examined(step: int, path: Path) -> Found:
    try:
        held = manifest.read(path)
    except ValueError as error:
        return Found(path, "damaged", fault=str(error))
    fault = manifest.size_fault(path, held) or manifest.content_fault(path, held)
    if held.step != step:
        fault = f"is the checkpoint of step {held.step}"
    return Found(path, "damaged" if fault else "complete", held, fault)


def damaged_steps(folder: Path) -> dict[int, str]:
    """The checkpoints that have their name, but not all files in full size: by step, what is wrong."""
    whole = complete(folder)
    found = {}
    for step, path in _named(folder):
        if step not in whole:
            try:
                held = manifest.read(path)
                found[step] = manifest.size_fault(path, held) or f"is the checkpoint of step {held.step}"
            except ValueError as error:
                found[step] = str(error)
    return found


def clean(folder: Path) -> list[str]:
    """Remove what was not written, or not removed, to its end. Returns the names."""
    left = [path for path in folder.iterdir() if _LEFT.fullmatch(path.name)] if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left if path.suffix == UNFINISHED)


def set_aside(folder: Path, step: int) -> Path:
    """Take a damaged checkpoint out of the way, and keep it. Returns its new place."""
    path = path_of(folder, step)
    places = (
        path.with_name(f"{path.name}.{number}{DAMAGED}" if number else path.name + DAMAGED) for number in range(99)
    )
    place = next(place for place in places if not place.exists())
    os.rename(path, place)
    return place


def remove(path: Path) -> None:
    """Remove a checkpoint so that it is at no moment a half one."""
    doomed = path.with_name(path.name + REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def superfluous(held: Sequence[Manifest], settings: CheckpointSection) -> list[int]:
    """The steps whose checkpoints the recipe does not keep; never the newest one's."""
    if settings.keep is None:
        return []
    steps = sorted(each.step for each in held)
    kept = set(steps[-settings.keep :])
    if settings.keep_every is not None:
        kept |= {step for step in steps if step % settings.keep_every == 0}
    if (best := best_of(held, settings)) is not None:
        kept.add(best)
    return [step for step in steps if step not in kept]


def best_of(held: Sequence[Manifest], settings: CheckpointSection) -> int | None:
    """The step of the best held-out value, the later of equal ones; None where it was never measured."""
    name = settings.metric_for_best_model
    measured = [(each.metrics[name], each.step) for each in held if name is not None and name in each.metrics]
    if not measured:
        return None
    sign = 1 if settings.greater_is_better else -1
    return max((sign * value, step) for value, step in measured)[1]


def other_batches(path: Path, about: Manifest, rows: int) -> str:
    """The line of a run that would go on with another number of rows a step."""
    return (
        f"output.resume: {path} was trained on {about.rows_per_step} rows a step, this run would be on {rows}; set "
        f"parallel.global_batch_size={about.rows_per_step}"
    )


def _named(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(found[1]), path) for found, path in names if found and path.is_dir())
