"""Loads a recipe's model as a run does, writes it again, and tells what memory that took: RECIPE OUT."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sft_dist.backend import settle
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.loading import load_trained_model
from sft_dist.process import end_process, leave_process_group, quiet_libraries, settle_accelerator
from sft_dist.recipe import load_recipe
from sft_dist.rundir import RunDir
from sft_dist.saving import save_sharded
from sft_dist.trainers.sft import sft_config
from sft_dist.world import World


def own_bytes() -> int:
    """Resident pages of this process's own, without those of mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def growth(into: dict[str, int], name: str) -> Iterator[None]:
    """The most that the process grew while the block ran."""
    before, over, peak = own_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        into[name] = max(peak[0], own_bytes()) - before


def main() -> None:
    quiet_libraries()
    settle_accelerator()
    recipe, out = load_recipe(sys.argv[1], sys.argv[3:]), Path(sys.argv[2])
    world, backend = World.from_environment(), settle(recipe)
    path = recipe.model.model_name_or_path
    said: list[str] = []
    # As in a run: they set up the process group, and DeepSpeed for the loading.
    args = sft_config(recipe, RunDir(out / "run"), world, False, False, backend, hidden=64)
    assert args.world_size == world.size
    told: dict[str, int] = {}
    with growth(told, "load"):
        model = load_trained_model(path, recipe, load_tokenizer(path, recipe.model), backend, world, False, said.append)
    with growth(told, "save"):
        save_sharded(model, out / "model", torch.float32, file_bytes=8 * 2**20)
    (out / f"told{os.environ['RANK']}.json").write_text(json.dumps(told | {"said": said}))
    leave_process_group()


main()
end_process(0)
