"""Starting a run again that ended before its time, from its newest checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import logtail
from launch.processes import Ending
from sft_dist.checkpoints import folder as folders
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_USER
from sft_dist.rundir import RunDir, claim


def run(recipe: Recipe, command: Sequence[str], retries: int, start: Callable[[Path, Recipe], Ending]) -> int:
    """Claim the run's folder and start the run, again at most `retries` times; returns the exit code of the last start.

    Not again: what is done, what only the user can mend, and what was told to stop.
    """
    for again in range(retries + 1):
        directory = claim(recipe, command)
        ending = start(directory.recipe, recipe)
        if again == retries or ending.stopped or ending.code in (EXIT_DONE, EXIT_USER):
            break
        output = recipe.output.model_copy(update={"resume": True, "overwrite": False})
        recipe = recipe.model_copy(update={"output": output})
        sys.stdout.flush()
        logtail.say([f"sft-dist: starting again ({again + 1} of {retries}) from {_newest(directory)}"])
    return ending.code


def _newest(directory: RunDir) -> str:
    steps = folders.complete(directory.checkpoints)
    return f"checkpoint-{max(steps)}" if steps else "the beginning"
