"""One rank of groups of processes: `runs.py LINK`, the number of an open pipe on which it is told what to do.

Loading the libraries takes longer than a run of a small model. They are loaded once; the work of each group is then
done by a child of its own that has loaded them and done nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypedDict

from sft_dist.process import end_process, guarded, leave_process_group, quiet_libraries, settle_accelerator
from sft_dist.recipe import load_recipe
from sft_dist.verify import worker as verify_worker


def cut(source: Path, run: Path, step: int) -> None:
    """A run's folder with the checkpoints up to a step and all records, some of which are of later steps."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    for path in (source / "checkpoints").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) <= step:
            shutil.copytree(path, run / "checkpoints" / path.name)


class Group(TypedDict):
    """What a child is to do.

    `work`: `verify`, the worker of `sft-dist verify` with the words that are given to it; or `runs`, one after another,
    of a file of JSON, [[recipe, override, ...], ...]. There an override that begins with `cut:` is no setting:
    `cut:FROM:STEP` first makes the run's folder a copy of another one's as it was when it was killed after a step.
    """

    work: str
    words: list[str]
    environment: dict[str, str]
    working_directory: str
    log: str


def main(link: Connection) -> int:
    """Load the libraries and have each group done that comes, until the other end of the pipe is gone.

    Answers each with the child's exit code. Whatever comes while a child works ends it. Returns the exit code, in the
    child that of its runs.
    """
    quiet_libraries()
    settle_accelerator()
    # Each of them loads the libraries of its stage.
    from sft_dist.stages import dpo, ppo, reward, sft  # noqa: F401

    while True:
        try:
            group: Group = link.recv()
        except EOFError:
            return 0
        child = os.fork()
        if child == 0:
            link.close()
            return _done(group)
        if link in wait([link, os.pidfd_open(child)]):
            os.kill(child, signal.SIGKILL)
            return 1
        link.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _done(group: Group) -> int:
    log = os.open(group["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(group["environment"])
    os.chdir(group["working_directory"])
    if group["work"] == "verify":
        return verify_worker.main(group["words"])
    return guarded(lambda: _runs(json.loads(Path(group["words"][0]).read_text())))


def _runs(jobs: list[list[str]]) -> None:
    settle_accelerator()
    from sft_dist import worker

    for file, *words in jobs:
        settings = [word for word in words if not word.startswith("cut:")]
        recipe = load_recipe(file, settings)
        if os.environ.get("RANK", "0") == "0":
            for word in words:
                if word.startswith("cut:"):
                    _, source, step = word.split(":")
                    cut(Path(source), Path(recipe.output.output_dir), int(step))
        with verify_worker.forgotten():
            worker.run(recipe, Path(file), ["sft-dist", "run"])
    leave_process_group()


if __name__ == "__main__":
    end_process(main(Connection(int(sys.argv[1]))))
