"""Opening a stream on a node, and what a checkpoint keeps of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_dist.config import Recipe
from sft_dist.data.producer import Job
from sft_dist.data.stream import Folder, Layout, Position, Stream
from sft_dist.errors import DataError, UserError
from sft_dist.paths import cache_dir
from sft_dist.recipe import dump_recipe
from sft_dist.rundir import write_text

_FILE = "stream.json"
# A producer that is killed is started again; one that is killed over the same block again is not.
_TRIES = 3


@dataclass(frozen=True)
class Saved:
    """What a checkpoint keeps of a stream: the rows trained on, the position before their block, and the sources."""

    row: int
    position: Position
    fingerprints: tuple[str, ...]

    def document(self) -> dict[str, str]:
        """The file of a checkpoint that keeps it, by its name."""
        held = {"row": self.row, "position": asdict(self.position), "fingerprints": self.fingerprints}
        return {_FILE: json.dumps(held)}

    @classmethod
    def read(cls, checkpoint: Path, fingerprints: tuple[str, ...]) -> Saved:
        """What a checkpoint keeps. Raises :class:`UserError` where it fits no stream of these sources."""
        try:
            held = json.loads((checkpoint / _FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"data.streaming: {checkpoint} was written without it; set it as it was, or start anew with "
                "output.overwrite=true"
            ) from None
        if tuple(held["fingerprints"]) != fingerprints:
            raise UserError(
                f"data.dataset_name: the data are not those that {checkpoint} was trained on, so that its position in "
                "them means nothing; bring them back, or start anew with output.overwrite=true"
            )
        return cls(held["row"], Position.of(held["position"]), fingerprints)


class ProducerProcess:
    """The producer of this node, started again when it was killed."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._starts: list[int] = []
        self._start()

    def _start(self) -> None:
        self._starts.append(max(self.folder.blocks(), default=-1))
        command = [sys.executable, "-m", "sft_dist.data.producer", str(self.folder.root)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)

    def check(self) -> None:
        """Start it again where it was killed; tell all ranks where that does not help."""
        code = self._process.poll()
        if code is None or self.folder.error.exists():
            return
        if self._starts[-_TRIES:].count(max(self.folder.blocks(), default=-1)) == _TRIES:
            text = (
                f"data.streaming: the process that prepares the data ended with {code} {_TRIES} times; "
                "where memory is short, lower data.shuffle_buffer, which says how much is prepared at once"
            )
            write_text(self.folder.error, text)
            return
        self._start()

    def stop(self) -> None:
        """End it and remove what it has made."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder.root, ignore_errors=True)


def stream_folder(recipe: Recipe) -> Folder:
    """The folder of a run's stream on this node; one that no other run shares."""
    name = f"{Path(recipe.output.output_dir).absolute()}\n{dump_recipe(recipe)}"
    return Folder(cache_dir() / "streams" / hashlib.sha256(name.encode()).hexdigest()[:32])


def open_stream(
    recipe: Recipe,
    limit: int | None,
    layout: Layout,
    start: Position,
    is_local_main: bool,
    together: Callable[[], None],
) -> tuple[Stream, ProducerProcess | None]:
    """The stream of a run from a position on, and on local rank 0 the process that makes it.

    All ranks call it; `together` is a barrier of theirs. `limit`: tokens of the longest row.
    """
    folder = stream_folder(recipe)
    process = None
    if is_local_main:
        shutil.rmtree(folder.root, ignore_errors=True)
        try:
            folder.root.mkdir(parents=True, mode=0o700)
            write_text(folder.root / "recipe.yaml", dump_recipe(recipe))
            Job(folder.root / "recipe.yaml", limit, layout, start).write(folder.job)
            write_text(folder.wanted, json.dumps([start.block, start.block]))
        except OSError as error:
            why = f"{folder.root}: {error.strerror or error}"
            raise DataError(f"data.streaming: {why}; set SFT_DIST_CACHE to a folder of yours with space") from error
        process = ProducerProcess(folder)
    together()
    return Stream(folder, layout, start, process.check if process is not None else None), process
