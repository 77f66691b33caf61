"""Where the stages run: one after the other on this machine, or each as a job of a cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol

from launch import check, logtail
from launch.pipeline import work
from launch.pipeline.stage import Pipeline, Stage
from sft_dist.config import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_RESUMABLE, UserError

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Runner(Protocol):
    """What runs stages. They come in an order in which each is behind what it needs.

    What is done already does not come. Whether a stage is to be run, and how, is decided anew when it starts
    (:func:`launch.pipeline.state.decide`), for its inputs may not be there before.
    """

    def look(self, stage: Stage, recipe: Recipe) -> None:
        """Raise :class:`UserError` with what would fail later of a stage with this recipe. Nothing is changed."""
        ...

    def start(self, stage: Stage, after: Sequence[str]) -> str:
        """Run a stage, or have it run, once those that `after` has the ids of have ended well. Returns its id.

        Raises :class:`UserError` where nothing more can be started.
        """
        ...

    def finish(self) -> int:
        """Called when all have been started, and to be called once. Returns the exit code of the pipeline."""
        ...


def runner_for(
    pipeline: Pipeline, command: Sequence[str], tries: int, cluster: str | None, nodes: int | None
) -> Runner:
    """The runner that the command line asks for. `nodes`: of stages that name none. Raises :class:`UserError`."""
    if cluster is not None:
        from launch.pipeline.slurm import SlurmRunner

        if tries:
            raise UserError("--retries: is for this machine; on Slurm the profile's `requeue` counts: leave it out")
        return SlurmRunner(pipeline, command, cluster, nodes)
    if nodes is not None:
        raise UserError("--nodes: belongs to --cluster; leave it out")
    return LocalRunner(pipeline, command, tries)


class LocalRunner:
    """Runs each stage to its end when it is started. To be used from the main thread.

    A signal to stop ends the stage that runs, such that it can go on, and starts no further one.
    """

    def __init__(self, pipeline: Pipeline, command: Sequence[str], tries: int) -> None:
        self._pipeline = pipeline
        self._orders = work.Orders(command, tries, lambda: self._stopped is not None, say)
        self._failed: dict[str, str] = {}
        self._codes: list[int] = []
        self._stopped: str | None = None
        self._handlers: dict[int, Any] = {}

    def look(self, stage: Stage, recipe: Recipe) -> None:
        """Raise :class:`UserError` with what would fail on this machine."""
        check.refuse_faults(check.findings(recipe), unverified_too=True)

    def start(self, stage: Stage, after: Sequence[str]) -> str:
        """Run a stage, unless one that it needs has failed, or the pipeline was told to stop."""
        # Between the processes of two stages nobody else hears them.
        self._listen()
        cause = next((self._failed[name] for name in after if name in self._failed), None)
        if self._stopped is not None:
            return stage.name
        if cause is not None:
            self._failed[stage.name] = cause
            say(f"{stage.name}: skipped, because {cause} failed")
            return stage.name
        outcome = work.carry_out(stage, self._pipeline, self._orders)
        if outcome.code == EXIT_DONE:
            say(f"{stage.name}: done")
        if outcome.resumable:
            self._stopped = stage.name
            if outcome.code not in (EXIT_DONE, EXIT_RESUMABLE):
                self._codes.append(outcome.code)
        elif outcome.code != EXIT_DONE:
            self._failed[stage.name] = stage.name
            self._codes.append(outcome.code)
            logtail.say([f"{logtail.PREFIX} {stage.name}: failed: {outcome.reason}"])
        return stage.name

    def finish(self) -> int:
        """The code of the first failure, 75 where it was stopped, 0 where all is well."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._stopped is not None:
            say("stopped; the same command goes on")
            return EXIT_RESUMABLE
        return self._codes[0] if self._codes else EXIT_DONE

    def _listen(self) -> None:
        if self._handlers:
            return
        for number in _STOPPING:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._stopped = self._stopped or signal.Signals(number).name


def say(line: str) -> None:
    """A line about the pipeline itself."""
    print(f"sft-dist: {line}", flush=True)
