"""The worker: `python -m sft_dist RECIPE [section.key=value ...]`, one process of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from sft_dist.errors import UserError
from sft_dist.process import end_process, guarded, leave_process_group, outlive_full_logs, settle_accelerator
from sft_dist.recipe import load_recipe
from sft_dist.rundir import command_line
from sft_dist.stopping import StopRequests


def main(words: list[str]) -> int:
    """Run one worker. Returns the exit code."""

    def work() -> None:
        if not words:
            raise UserError("no recipe was given; usage: python -m sft_dist RECIPE [section.key=value ...]")
        recipe = load_recipe(words[0], words[1:])
        # From here on, for the libraries take seconds to load.
        with StopRequests(recipe.checkpoint.signals, recipe.checkpoint.grace, to_the_end=True):
            settle_accelerator()
            from sft_dist import worker

            worker.run(recipe, Path(words[0]), command_line())
        leave_process_group()

    outlive_full_logs()
    return guarded(work)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
