"""Writing checkpoints beside the training: a copy in memory, files, a manifest, and the name last of all."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.files import Flat, write_bytes, write_tensors
from sft_dist.checkpoints.manifest import File, Manifest
from sft_dist.checkpoints.pieces import Piece
from sft_dist.checkpoints.together import Place, Together
from sft_dist.config import CheckpointSection


@dataclass(frozen=True)
class Contents:
    """What this rank adds to a checkpoint. `documents`: small files by name; `about`: the manifest without files."""

    pieces: Sequence[Piece]
    documents: Mapping[str, bytes]
    about: Manifest


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `fault`: why there is no checkpoint, in words; `waited`: seconds the training stood."""

    step: int
    fault: str | None = None
    bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    bug: BaseException | None = None


class HostCopy:
    """Copies of tensors in the memory of the processor; the memory is used again for the next copy."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces as they are now."""
        taken = []
        for piece in pieces:
            held = self._held.get(piece.key)
            if held is None or held.shape != piece.tensor.shape or held.dtype != piece.tensor.dtype:
                held = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=torch.cuda.is_available())
                self._held[piece.key] = held
            held.copy_(piece.tensor, non_blocking=True)
            taken.append(replace(piece, tensor=held))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken


class Writer:
    """Writes the checkpoints of a run, one at a time. All ranks call each method together, but `outcomes`."""

    def __init__(self, folder: Path, settings: CheckpointSection, place: Place, background: Together) -> None:
        self.folder = folder
        self._settings = settings
        self._place = place
        self._together = background
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []
        self.in_flight: int | None = None

    def save(self, contents: Contents, *, wait: bool, began: float) -> None:
        """Begin to write a checkpoint; nothing is in flight. `wait`: until it is complete, or is not.

        `began`: the reading of `time.perf_counter` when the training began to wait.
        """
        step = contents.about.step
        if wait:
            # From where it lies: nothing changes while it is waited for.
            self._outcomes.append(replace(self._attempt(contents), waited=time.perf_counter() - began))
            return
        taken = replace(contents, pieces=self._copy.take(contents.pieces))
        self.in_flight = step
        waited = time.perf_counter() - began
        self._thread = threading.Thread(target=self._work, args=(taken, waited), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether nothing is in flight, after at most so many seconds."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True

    def outcomes(self) -> list[Outcome]:
        """What became of the saves that ended since the last look."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        found, self._outcomes = self._outcomes, []
        return found

    def _work(self, contents: Contents, waited: float) -> None:
        outcome = replace(self._attempt(contents), waited=waited)
        self._outcomes.append(outcome)
        self.in_flight = None

    def _attempt(self, contents: Contents) -> Outcome:
        began = time.perf_counter()
        step = contents.about.step
        try:
            done = self._write(contents)
            return replace(done, seconds=time.perf_counter() - began)
        except Exception as error:  # A rank that died, for the one.
            return Outcome(step, f"{type(error).__name__}: {error}", bug=error)

    def _write(self, contents: Contents) -> Outcome:
        step = contents.about.step
        unfinished = self.folder / f"checkpoint-{step}{folders.UNFINISHED}"
        files, fault, bug = self._files(unfinished, contents)
        every = self._together.every((self._place.leader, files, fault))
        found = _first_fault([fault for _, _, fault in every])
        if found is None:
            own = self._complete(unfinished, contents.about, every) if self._place.is_leader else None
            found = _first_fault(self._together.every(own))
            if found is not None and self._place.is_leader and own is None:
                # Complete here, but not on another node.
                self._take_back(step)
        if self._place.is_leader:
            shutil.rmtree(unfinished, ignore_errors=True)
            if found is None:
                self._tidy()
        # Nobody begins anew while a folder is being removed.
        self._together.every(None)
        return Outcome(step, found, sum(file.bytes for _, held, _ in every for file in held.values()), bug=bug)

    def _files(self, unfinished: Path, contents: Contents) -> tuple[dict[str, File], str | None, Exception | None]:
        """Write this rank's files. What fails is told to all, who wait for it."""
        files: dict[str, File] = {}
        name = f"rank-{self._together.rank:05d}.safetensors"
        try:
            unfinished.mkdir(parents=True, exist_ok=True, mode=0o700)
            files[name] = write_tensors(unfinished / name, [_flat(piece) for piece in contents.pieces])
            for document, content in contents.documents.items():
                files[document] = write_bytes(unfinished / document, content)
            manifest.flush_folder(unfinished)
        except OSError as error:
            return {}, f"{error.filename or unfinished}: {error.strerror or error}", None
        except Exception as error:
            return {}, f"{type(error).__name__}: {error}", error
        return files, None, None

    def _complete(
        self, unfinished: Path, about: Manifest, every: Sequence[tuple[int, Mapping[str, File], str | None]]
    ) -> str | None:
        """Write the manifest and give the checkpoint its name, once a folder. Returns what failed."""
        files = {name: file for leader, held, _ in every if leader == self._place.leader for name, file in held.items()}
        try:
            text = replace(about, files=files, nodes=len(self._place.leaders)).to_json()
            write_bytes(unfinished / manifest.NAME, text.encode())
            manifest.flush_folder(unfinished)
            final = folders.path_of(self.folder, about.step)
            if final.exists():
                # A complete one of this step would not be written again.
                folders.set_aside(self.folder, about.step)
            os.rename(unfinished, final)
        except OSError as error:
            return f"{error.filename or unfinished}: {error.strerror or error}"
        try:
            manifest.flush_folder(self.folder)
        except OSError as error:
            # Its name may not be on the disk.
            self._take_back(about.step)
            return f"{error.filename or self.folder}: {error.strerror or error}"
        return None

    def _take_back(self, step: int) -> None:
        with suppress(OSError):
            folders.remove(folders.path_of(self.folder, step))

    def _tidy(self) -> None:
        """Remove what the recipe does not keep, now that a newer one is complete."""
        held = folders.complete(self.folder)
        for step in folders.superfluous(list(held.values()), self._settings):
            try:
                folders.remove(folders.path_of(self.folder, step))
            except OSError:
                # It takes up space, and is tried again after the next one.
                return


def _first_fault(faults: Sequence[str | None]) -> str | None:
    return next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault), None)


def _flat(piece: Piece) -> Flat:
    held = piece.tensor.detach().cpu().contiguous()
    return Flat(piece.key, piece.dtype, held.numel(), memoryview(held.view(torch.uint8).numpy().data))
