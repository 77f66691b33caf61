"""The checkpoints of a run as its training uses them: choosing one to go on from, saving, and loading."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.checkpoints.pieces import Reader
from sft_dist.checkpoints.states import States
from sft_dist.checkpoints.together import Place, Together
from sft_dist.checkpoints.writer import Contents, Outcome, Writer
from sft_dist.config import CheckpointSection
from sft_dist.errors import UserError

TRAINER, COMMON = "trainer_state.json", "common.json"


@dataclass(frozen=True)
class Held:
    """A checkpoint that is gone on from. `ranks`: what each process that wrote it kept for itself, by rank."""

    path: Path
    manifest: Manifest
    common: Mapping[str, Any]
    ranks: Mapping[int, Mapping[str, Any]]

    @property
    def steps(self) -> dict[str, float]:
        """The optimizer's counts of steps, by parameter."""
        return {name: count for rank in self.ranks.values() for name, count in rank["steps"].items()}

    def reader(self) -> Reader:
        """The tensors."""
        files = (self.path / name for name in self.manifest.files if name.endswith(".safetensors"))
        return Reader(files, self.common["shapes"])


class Keeper:
    """Chooses, writes and reads the checkpoints of a run. All ranks call each method together.

    `say` is for lines to people, and does nothing but on rank 0.
    """

    def __init__(self, folder: Path, settings: CheckpointSection, local_rank: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.settings = settings
        self.together = Together("training")
        try:
            if local_rank == 0:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.together.every(None)
            self.place = Place(folder, self.together, local_rank)
        except OSError as error:
            raise UserError(f"output.output_dir: {folder} cannot be written: {error.strerror}; mend that") from error
        self._writer = Writer(folder, settings, self.place, Together("checkpoints"))
        self._say = say
        self.failures = 0
        self.slowest = 0.0
        self.newest: int | None = None

    def choose(self) -> Held | None:
        """The newest checkpoint that is complete and whole on every node, or None.

        What was left unfinished is removed, and what is damaged is named and set aside.
        """
        left = folders.clean(self.folder) if self.place.is_leader else []
        self._say_all([f"{self.folder / name}: not written to its end, removed" for name in left])
        self._set_aside(folders.damaged_steps(self.folder) if self.place.is_leader else {})
        while True:
            # One a folder looks: a listing of many files by all ranks is hard work for a file system.
            own = set(folders.complete(self.folder)) if self.place.is_leader else None
            every = [steps for steps in self.together.every(own) if steps is not None]
            steps = set.intersection(*every)
            if not steps:
                return None
            step = max(steps)
            held = manifest.read(folders.path_of(self.folder, step))
            fault = self._content_fault(held)
            # Every rank has read its share of the files.
            faults = [found for found in self.together.every(fault) if found]
            if not faults:
                self.newest = step
                return self._held(held)
            self._set_aside({step: faults[0]} if self.place.is_leader else {})

    def _content_fault(self, held: Manifest) -> str | None:
        names = sorted(held.files)[self.place.index :: self.place.count]
        return manifest.content_fault(folders.path_of(self.folder, held.step), held, names)

    def _set_aside(self, faults: Mapping[int, str]) -> None:
        lines = []
        for step, fault in faults.items():
            place = folders.set_aside(self.folder, step)
            lines.append(f"{folders.path_of(self.folder, step)}: damaged ({fault}); kept aside as {place.name}")
        self._say_all(lines)

    def _say_all(self, lines: Sequence[str]) -> None:
        """Say what the ranks have to say, each line once."""
        for line in dict.fromkeys(line for own in self.together.every(list(lines)) for line in own):
            self._say(line)

    def _held(self, about: Manifest) -> Held:
        path = folders.path_of(self.folder, about.step)
        ranks = {
            int(name[5:10]): json.loads((path / name).read_text(encoding="utf-8"))
            for name in about.files
            if name.startswith("rank-") and name.endswith(".json")
        }
        return Held(path, about, json.loads((path / COMMON).read_text(encoding="utf-8")), ranks)

    def save(
        self, about: Manifest, states: States, own: Mapping[str, Any], common: Mapping[str, Any],
        documents: Mapping[str, str], *, wait: bool = False, began: float | None = None
    ) -> None:  # fmt: skip
        """Begin to write a checkpoint. `own`: what this rank keeps for itself; `documents`: by name, alike on all.

        `wait`: until it is complete. `began`: when the training began to wait (`time.perf_counter`); unset: now.

        One of this step that is complete already is left as it is.
        """
        if self._is_there(about.step):
            return
        began = time.perf_counter() if began is None else began
        rank = self.together.rank
        files = {f"rank-{rank:05d}.json": json.dumps({"steps": states.steps(), **own})}
        if self.place.is_leader:
            files |= {COMMON: json.dumps({"shapes": states.shapes(), **common}), **documents}
        content = {name: text.encode() for name, text in files.items()}
        contents = Contents(states.pieces(), content, about)
        self._writer.save(contents, wait=wait or not self.settings.asynchronous, began=began)

    def _is_there(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete in every folder."""
        own = None
        if self.place.is_leader:
            own = folders.path_of(self.folder, step).is_dir() and step in folders.complete(self.folder)
        return all(there for there in self.together.every(own) if there is not None)

    @property
    def in_flight(self) -> int | None:
        """The step whose checkpoint is being written, or None."""
        return self._writer.in_flight

    def wait(self, seconds: float | None = None) -> bool:
        """Whether nothing is being written on this rank, after at most so many seconds."""
        return self._writer.wait(seconds)

    def look(self) -> None:
        """Tell what became of earlier saves, and count those that failed in a row. Raises what was a bug."""
        for outcome in self._writer.outcomes():
            self._count(outcome)

    def _count(self, outcome: Outcome) -> None:
        if outcome.bug is not None:
            raise RuntimeError(f"checkpoint-{outcome.step} could not be written") from outcome.bug
        if outcome.fault is not None:
            self.failed(outcome.step, outcome.fault)
            return
        self.failures = 0
        self.newest = outcome.step
        self.slowest = max(self.slowest, outcome.seconds)
        self._say(
            f"checkpoint-{outcome.step}: {outcome.bytes / 1e9:.3f} GB in {outcome.seconds:.1f} s, for which the "
            f"training waited {outcome.waited:.2f} s"
        )

    def failed(self, step: int, fault: str) -> None:
        """Count a save that came to nothing, and say so."""
        self.failures += 1
        most = self.settings.max_failures
        goes_on = "the training goes on and tries again" if self.failures < most else "the run stops"
        self._say(f"checkpoint-{step}: not written ({fault}); {goes_on} (failure {self.failures} of {most})")


def refuse_other_batches(held: Held, rows_per_step: int, data: str) -> None:
    """Raise :class:`UserError` where a checkpoint stands in other batches than those of this run."""
    about = held.manifest
    if about.rows_per_step != rows_per_step:
        raise UserError(folders.other_batches(held.path, about, rows_per_step))
    if about.data != data:
        raise UserError(
            f"output.resume: the rows that {held.path} was trained on were others than those of now; bring the data "
            "back as they were, or start anew with output.overwrite=true"
        )
