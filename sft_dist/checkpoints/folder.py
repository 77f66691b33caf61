"""The folder of a run's checkpoints: which are there, in what state, and which are kept. Free of torch.

`checkpoint-N` is complete: it gets its name last. What is being written is `checkpoint-N.unfinished`, what is being
removed `checkpoint-N.removed`; both are nothing to a reader, and are cleaned away at the next start. A complete one
that was found damaged is set aside as `checkpoint-N.damaged` and never removed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.config import CheckpointSection

UNFINISHED, REMOVED, DAMAGED = ".unfinished", ".removed", ".damaged"
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
_NOT_TO_ITS_END = "was not written to its end; nothing reads it"
_LEFT = re.compile(r"checkpoint-\d+(\.unfinished|\.removed)")


@dataclass(frozen=True)
class Found:
    """A checkpoint as it was found. `fault`: what is wrong with it, in words."""

    path: Path
    state: Literal["complete", "damaged", "unfinished"]
    manifest: Manifest | None = None
    fault: str | None = None

    @property
    def step(self) -> int:
        """The step by its name."""
        return step_of(self.path)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, of one that is unfinished or set aside, too; -1 where there is none."""
    named = _NAME.match(path.name)
    return int(named[1]) if named else -1


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def complete(folder: Path) -> dict[int, Manifest]:
    """The checkpoints whose files are all there in full size, by step; what is in the files is not read."""
    found = _at_a_glance(folder)
    return {each.step: each.manifest for each in found if each.state == "complete" and each.manifest is not None}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one of these checkpoints, whole or not."""
    if (path / "config.json").exists() or not path.is_dir():
        return False
    return (path / manifest.NAME).exists() or any(path.glob("rank-*")) or path.suffix == UNFINISHED


def fault_of(path: Path) -> str | None:
    """What keeps a checkpoint from being read, or None; every byte of it is looked at."""
    if path.suffix == UNFINISHED:
        return _NOT_TO_ITS_END
    try:
        held = manifest.read(path)
    except ValueError as error:
        return str(error)
    return manifest.size_fault(path, held) or manifest.content_fault(path, held)


def examine(folder: Path, *, contents: bool = True) -> list[Found]:
    """Everything in the folder with its state, by step. `contents`: every byte is read, else only sizes are looked at.

    What went away meanwhile is left out: a run that is alive removes checkpoints.
    """
    found = [_examined(step, path, contents) for step, path in _named(folder)]
    for path in sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []:
        if path.suffix == UNFINISHED:
            found.append(Found(path, "unfinished", fault=_NOT_TO_ITS_END))
        elif path.suffix == DAMAGED:
            found.append(_set_aside_earlier(path, contents))
    return sorted((each for each in found if each.path.exists()), key=lambda each: each.step)


def _examined(step: int, path: Path, contents: bool) -> Found:
    try:
        held = manifest.read(path)
    except ValueError as error:
        return Found(path, "damaged", fault=str(error))
    fault = manifest.size_fault(path, held) or (manifest.content_fault(path, held) if contents else None)
    if held.step != step:
        fault = f"is the checkpoint of step {held.step}"
    return Found(path, "damaged" if fault else "complete", held, fault)


def _set_aside_earlier(path: Path, contents: bool) -> Found:
    found = _examined(step_of(path), path, contents)
    fault = f"{found.fault}; set aside" if found.fault else "set aside when it was found damaged"
    return replace(found, state="damaged", fault=fault)


def damaged_steps(folder: Path) -> dict[int, str]:
    """The checkpoints that have their name, but not all files in full size: by step, what is wrong."""
    return {each.step: each.fault for each in _at_a_glance(folder) if each.fault is not None}


def _at_a_glance(folder: Path) -> list[Found]:
    return [_examined(step, path, contents=False) for step, path in _named(folder)]


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
    """The step of the best held-out value, the later of equal ones; None where it was never measured. NaN is none."""
    name = settings.metric_for_best_model
    values = [(each.metrics.get(name, math.nan), each.step) for each in held if name is not None]
    measured = [(value, step) for value, step in values if not math.isnan(value)]
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
