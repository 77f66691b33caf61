"""`python -m sft_dist.data.producer FOLDER`: makes the blocks of a stream, a few ahead of what is wanted.

It ends when its standard input does, which its parent holds open: nobody has to end it, whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_dist.config import Recipe
from sft_dist.data.feeds import documents
from sft_dist.data.stream import Folder, Layout, Position
from sft_dist.data.stream_sources import open_feeds
from sft_dist.errors import EXIT_USER, UserError
from sft_dist.recipe import load_recipe
from sft_dist.rundir import write_text

# Blocks that are made before they are wanted.
_AHEAD = 2
_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Job:
    """What the producer is told: the resolved recipe, the length limit of a row, the layout, and where to begin."""

    recipe: Path
    limit: int | None
    layout: Layout
    start: Position

    def write(self, path: Path) -> None:
        held = {"recipe": str(self.recipe), "limit": self.limit, "layout": asdict(self.layout)}
        write_text(path, json.dumps(held | {"start": asdict(self.start)}))

    @classmethod
    def read(cls, path: Path) -> Job:
        held = json.loads(path.read_text(encoding="utf-8"))
        start = Position.of(held["start"])
        return cls(Path(held["recipe"]), held["limit"], Layout(**held["layout"]), start)


class Producer:
    """Makes blocks in their order, from a position on."""

    def __init__(self, folder: Folder, recipe: Recipe, limit: int | None, layout: Layout, start: Position) -> None:
        self.folder = folder
        self.layout = layout
        self.position = _behind_what_is_there(folder, start)
        self.buffer = recipe.data.shuffle_buffer
        self.feeds, self.draws = open_feeds(recipe, limit, self.position)

    def make(self) -> None:
        """Make the next block, whole or not at all."""
        held = documents(self.feeds, self.draws, self.buffer)
        rows = self.layout.rows(self.position.block, held["length"].to_numpy().astype(np.int64))
        after = Position(
            self.position.block + 1,
            self.position.row + len(rows),
            tuple(feed.place for feed in self.feeds),
            None if self.draws is None else self.draws.state,
        )
        target = self.folder.block(self.position.block)
        unfinished = target.with_name(f"unfinished-{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _write_rows(unfinished / "rows.arrow", held)
        accounts = [asdict(feed.account) for feed in self.feeds]
        state = {"before": asdict(self.position), "after": asdict(after), "accounts": accounts}
        (unfinished / "block.json").write_text(json.dumps(state), encoding="utf-8")
        os.replace(unfinished, target)
        self.position = after

    def keep_up(self) -> None:
        """Make what is wanted and a few more, and remove what is wanted no longer, for ever."""
        while True:
            first, last = json.loads(self.folder.wanted.read_text(encoding="utf-8"))
            for number in self.folder.blocks():
                if number < first:
                    shutil.rmtree(self.folder.block(number))
            if self.position.block <= last + _AHEAD:
                self.make()
            else:
                time.sleep(_POLL)


def _behind_what_is_there(folder: Folder, start: Position) -> Position:
    """The position behind the last block of an earlier producer that was killed."""
    there = [number for number in folder.blocks() if number >= start.block]
    if not there:
        return start
    held = json.loads((folder.block(there[-1]) / "block.json").read_text(encoding="utf-8"))
    return Position.of(held["after"])


def _write_rows(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _end_with_parent() -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main(words: Sequence[str]) -> int:
    """Produce until the parent ends. An error the user can mend is written for all ranks to find."""
    _end_with_parent()
    folder = Folder(Path(words[0]))
    try:
        job = Job.read(folder.job)
        Producer(folder, load_recipe(job.recipe), job.limit, job.layout, job.start).keep_up()
    except UserError as error:
        write_text(folder.error, str(error))
        return EXIT_USER
    except OSError as error:
        write_text(folder.error, f"data.streaming: {folder.root}: {error.strerror or error}; free some space, or set "
                    "SFT_DIST_CACHE to a larger disk")  # fmt: skip
        return EXIT_USER
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
