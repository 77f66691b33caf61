"""One process of several runs, one after another: `runs.py JOBS`, a file of JSON: [[recipe, override, ...], ...].

Starting the processes takes longer than a run of a small model. An override that begins with `cut:` is no setting:
`cut:FROM:STEP` first makes the run's folder a copy of another one's as it was when it was killed after a step. With
NODE_FOLDER in the environment they work there, as on a node that shares no files with others.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from sft_dist.process import guarded, leave_process_group, settle_accelerator
from sft_dist.recipe import load_recipe
from sft_dist.verify.worker import _forget


def cut(source: Path, run: Path, step: int) -> None:
    """A run's folder with the checkpoints up to a step and all records, some of which are of later steps."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    for path in (source / "checkpoints").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) <= step:
            shutil.copytree(path, run / "checkpoints" / path.name)


def main(jobs: list[list[str]]) -> int:
    """Do the runs. Returns the exit code."""

    def work() -> None:
        settle_accelerator()
        if "NODE_FOLDER" in os.environ:
            os.chdir(os.environ["NODE_FOLDER"])
        from sft_dist import worker

        launched = dict(os.environ)
        for file, *words in jobs:
            settings = [word for word in words if not word.startswith("cut:")]
            recipe = load_recipe(file, settings)
            if os.environ.get("RANK", "0") == "0":
                for word in words:
                    if word.startswith("cut:"):
                        _, source, step = word.split(":")
                        cut(Path(source), Path(recipe.output.output_dir), int(step))
            worker.run(recipe, Path(file), ["sft-dist", "run"])
            os.environ.clear()
            os.environ.update(launched)
            _forget()
        leave_process_group()

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
