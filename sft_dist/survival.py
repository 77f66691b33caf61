"""What keeps a run alive, for its trainer: its checkpoints, the signals it obeys, and what watches over it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sft_dist.checkpoints.keeper import Held, Keeper
from sft_dist.checkpoints.manifest import Manifest
from sft_dist.metrics_file import append
from sft_dist.stopping import Stopped, StopRequests
from sft_dist.trainers.guard import Event, Guard
from sft_dist.trainers.watchdog import Watchdog

T = TypeVar("T")
_SAMPLES_SHOWN = 3


class Survival:
    """All ranks call each method together, but where it says otherwise.

    `about`: what every checkpoint of the run says of itself. `events`: file that takes what went wrong. `can_save`:
    whether there can be checkpoints at all.
    """

    def __init__(
        self, keeper: Keeper, requests: StopRequests, guard: Guard, watchdog: Watchdog, about: Manifest, events: Path,
        say: Callable[[str], None], can_save: bool = True,
    ) -> None:  # fmt: skip
        self.keeper = keeper
        self.requests = requests
        self.guard = guard
        self.watchdog = watchdog
        self.stopping: str | None = None
        self.first_step = True
        self._about = about
        self._events = events
        self._say = say
        self._can_save = can_save

    def tell(self, line: str) -> None:
        """A line to people, from rank 0. On any rank."""
        self._say(line)

    def about(self, step: int, *, tokens: int, trained_tokens: int, metrics: Mapping[str, float]) -> Manifest:
        """The manifest of a checkpoint of now, without its files. On any rank."""
        return replace(self._about, step=step, tokens=tokens, trained_tokens=trained_tokens, metrics=metrics)

    @property
    def within_training(self) -> bool:
        """Whether steps are being done: between the first and the last."""
        return self.requests.within_training

    def begin_step(self) -> None:
        """A step begins."""
        if self.first_step:
            self.first_step = False
            self.requests.within_training = True
            self.watchdog.start()

    def end_step(self, step: int) -> bool:
        """Whether to save and stop now. Raises :class:`Stopped` where there is no use in saving."""
        self.watchdog.step_ended()
        self.keeper.look()
        settings = self.keeper.settings
        failed = self.keeper.failures >= settings.max_failures
        number, any_failed = self.keeper.together.most([self.requests.number, failed])
        if any_failed:
            raise Stopped(
                f"checkpoint.max_failures: {settings.max_failures} checkpoints in a row could not be written; make "
                f"room or bring the file system back; {self._goes_on()}",
                # A write that hangs would hold up an orderly end.
                agreed=False,
            )
        return self._heard(number)

    def asked_to_stop(self) -> bool:
        """Whether a signal has been heard on any rank."""
        return self._heard(*self.keeper.together.most([self.requests.number]))

    def _heard(self, number: int) -> bool:
        if number and self.stopping is None:
            self.stopping = signal.Signals(number).name
            self._say(f"{self.stopping}: saving and stopping")
        return bool(number)

    def may_save(self, step: int) -> bool:
        """Whether a checkpoint can be begun: at most one is being written, and that one is waited for a while."""
        in_flight = self.keeper.in_flight
        with self.watchdog.paused():
            busy = not self.keeper.wait(self.keeper.settings.grace)
        self.keeper.look()
        # 0 where nothing is: no checkpoint is written before the first step.
        (unfinished,) = self.keeper.together.most([in_flight or 0 if busy else 0])
        if unfinished:
            self.keeper.failed(step, f"checkpoint-{unfinished} is still being written")
        return not unfinished

    def time_to_save(self, step: int) -> bool:
        """Whether a checkpoint of now is still wanted, and can be expected to be complete in time."""
        if not self._can_save:
            return False
        busy = not self.keeper.wait(self.requests.seconds_left)
        self.keeper.look()
        late = self.keeper.slowest > self.requests.seconds_left
        busy, late = (bool(value) for value in self.keeper.together.most([busy, late]))
        if late and not busy:
            self._say(f"checkpoint-{step}: no time left to write it (the last one took {self.keeper.slowest:.0f} s)")
        return not (busy or late)

    def stop(self, step: int) -> None:
        """Raise :class:`Stopped` for the signal that was heard."""
        self.keeper.look()
        raise Stopped(f"stopped by {self.stopping} at step {step}; {self._goes_on()}", agreed=True)

    def _goes_on(self) -> str:
        newest = self.keeper.newest
        place = "the beginning" if newest is None else f"checkpoint-{newest}"
        return f"goes on from {place} with output.resume=true"

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the watchdog does not count the time that they take to come. On any rank."""
        while True:
            with self.watchdog.paused():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def end_steps(self) -> None:
        """The last step is done: wait for what is being written."""
        self.watchdog.stop()
        self.keeper.wait()
        self.keeper.look()

    def end_training(self) -> None:
        """The model is written. Raises :class:`Stopped` where a signal has asked for the end meanwhile."""
        self.requests.within_training = False
        if self.requests.number:
            raise Stopped(f"stopped by {self.requests.name} when the model was written", agreed=False)

    def newest_to_roll_back_to(self) -> Held | None:
        """The newest checkpoint, after the one that is being written; None without one."""
        with self.watchdog.paused():
            self.keeper.wait()
            self.keeper.look()
            return self.keeper.choose()

    def record(self, event: Event, step: int, samples: Sequence[str], rolled_back_to: int | None) -> None:
        """Say what went wrong with a step, and keep it."""
        action = {"skip": "its update is left out", "stop": "the run stops"}.get(event.action)
        if event.action == "rollback":
            action = f"back to the weights of step {rolled_back_to}" if rolled_back_to is not None else "the run stops"
        shown = ", ".join(samples[:_SAMPLES_SHOWN]) + (" ..." if len(samples) > _SAMPLES_SHOWN else "")
        self._say(f"step {step}: {event.told()}; {action} (records {shown})")
        if self.keeper.together.rank == 0:
            held = {"step": step, "what": event.what, "value": repr(event.value), "median": event.median,
                    "action": event.action, "rolled_back_to": rolled_back_to, "samples": list(samples)}  # fmt: skip
            with suppress(OSError):
                append(self._events, (json.dumps(held, ensure_ascii=False) + "\n").encode())

    def stopped_for(self, event: Event, step: int) -> str:
        """The line of a run that stops because of wrong numbers. On any rank."""
        key = "guard.nonfinite" if event.median is None else "guard.on_spike"
        why = "no checkpoint to go back to; " if event.action == "rollback" else ""
        return (
            f"{key}: step {step}: {event.told()}; {why}lower train.learning_rate, mend the data ({self._events} names "
            f"the records), or set {key}=skip and resume"
        )
