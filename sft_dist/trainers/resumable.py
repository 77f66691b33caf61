"""A trainer that can be stopped, killed and gone on with: what transformers' Trainer does about checkpoints, anew.

Between two steps all ranks agree on what comes next: whether to stop, and whether a checkpoint can be written.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from sft_dist.checkpoints import rng
from sft_dist.checkpoints.keeper import TRAINER, Held
from sft_dist.checkpoints.zero import states_of
from sft_dist.data.order import FILLER
from sft_dist.errors import UserError
from sft_dist.survival import Survival
from sft_dist.trainers.guard import Event, Gate

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class EvaluationStopped(Exception):
    """An evaluation was left for a signal."""


class Resumable(Base):  # type: ignore[misc]
    """To be mixed into a trainer of transformers, before it among the bases."""

    survival: Survival
    _held: Held | None = None

    def survive(self, survival: Survival, held: Held | None) -> None:
        """Be stopped and gone on with. `held`: the checkpoint that is gone on from."""
        self.survival, self._held = survival, held
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._evaluation_is_due = False
        self._losses: list[torch.Tensor] = []
        self._event: Event | None = None
        # A mean over sound numbers in the place of a NaN would be a number that nobody measured.
        self.args.logging_nan_inf_filter = False
        self.add_callback(_Boundaries(self))

    # What a checkpoint keeps beside weights and optimizer, to be extended by the trainers.

    def loop_state(self) -> dict[str, Any]:
        """What the loop of this rank stands at, as JSON."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in getattr(self, "_metrics", {}).get("train", {}).items()},
            "tokens": getattr(self, "_total_train_tokens", 0),
            "guard": self.survival.guard.state(),
        }

    def load_loop_state(self, own: Mapping[str, Any], every: list[Mapping[str, Any]]) -> None:
        """Go on from what `loop_state` gave.

        `own`: of this rank, or of rank 0 where it was written by another number of ranks; `every`: of all that wrote.
        """
        # The loss that is logged is the mean over the ranks, however many there are.
        loss = own["loss"] if own["same_ranks"] else sum(each["loss"] for each in every) / len(every)
        self._tr_loss.fill_(loss)
        self._total_loss_scalar = own["total_loss"]
        self._globalstep_last_logged = own["last_logged"]
        if hasattr(self, "_metrics"):
            self._metrics["train"].clear()
            self._metrics["train"].update({name: list(values) for name, values in own["metrics"].items()})
            self._total_train_tokens = own["tokens"]
        self.survival.guard.load_state(own["guard"])

    def documents(self) -> dict[str, str]:
        """Further files of a checkpoint, by name, alike on all ranks."""
        return {}

    def samples_of_step(self) -> list[str]:
        """The records of the step that was just done, as people find them."""
        return []

    # Saving.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        self.store_flos()
        if self.survival.stopping is not None:
            self._save_and_stop()
        elif self.survival.may_save(self.state.global_step):
            self._write_checkpoint(wait=False, began=began)

    def _write_checkpoint(self, wait: bool, began: float | None = None) -> None:
        survival, step = self.survival, self.state.global_step
        evaluated, metrics = self._evaluated
        about = survival.about(
            step,
            tokens=self.throughput.tokens,
            trained_tokens=self.throughput.trained_tokens,
            metrics=metrics if evaluated == step else {},
        )
        own = {"rng": rng.capture(), "loop": self.loop_state()}
        common = {"scheduler": self.lr_scheduler.state_dict(), "evaluation_is_due": self._is_evaluation_due()}
        state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
        # The ranks wait for each other before the copy, and one may hang.
        is_waited_for = wait or not survival.keeper.settings.asynchronous
        with survival.watchdog.paused() if is_waited_for else nullcontext():
            survival.keeper.save(
                about, self._states(), own, common, {TRAINER: state, **self.documents()}, wait=wait, began=began
            )

    def _save_and_stop(self) -> None:
        step = self.state.global_step
        with self.survival.watchdog.paused():
            if self.survival.time_to_save(step):
                self._write_checkpoint(wait=True)
        self.survival.stop(step)

    def _is_evaluation_due(self) -> bool:
        """Whether the held-out loss is to be measured at this step and was not yet."""
        step, args = self.state.global_step, self.args
        if self._evaluated[0] == step:
            return False
        ends_epoch = float(self.state.epoch or 0).is_integer() and args.eval_strategy == "epoch"
        return self._evaluation_is_due or ends_epoch

    def _states(self) -> Any:
        return states_of(self.model, self.optimizer, self.survival.keeper.place)

    # Going on.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are put back when model and optimizer are wrapped (see `_prepare_for_training`)."""

    def create_optimizer(self, *args: Any) -> Any:
        """As the base class; which parameters the optimizer was made for is remembered."""
        optimizer = super().create_optimizer(*args)
        self._optimized = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_fsdp_enabled:
            # accelerate knows them again by the address of their rows, which is the same of all that have none on this
            # rank, such as heads of one row: one of them, perhaps a frozen one, would stand for all.
            for group, parameters in zip(self.optimizer.param_groups, self._optimized, strict=True):
                group["params"] = parameters
        self._gate = Gate(self.optimizer)
        if self._held is not None:
            self._put_back(self._held)
            if isinstance(prepared[0], DistributedDataParallel):
                self._settle_buckets(prepared[0])
        return prepared

    def _settle_buckets(self, model: Any) -> None:
        """Let DDP order its buckets of gradients as it does after the first step of a run.

        Among more than two ranks the order decides in which order numbers are added, and so their last bits.
        """
        batch = self.data_collator([self.train_dataset[FILLER]])
        self.training_step(model, batch, torch.tensor(1.0, device=self.args.device))
        model.zero_grad()

    def _put_back(self, held: Held) -> None:
        """Weights, optimizer and learning rate of a checkpoint."""
        self._states().load(held.reader(), held.steps)
        self.lr_scheduler.load_state_dict(dict(held.common["scheduler"]))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: Any) -> None:
        held = self._held
        if held is None:
            return
        if held.manifest.world_size == self.args.world_size:
            rng.restore(dict(held.ranks[self.args.process_index]["rng"]))

    def on_training_begins(self) -> None:
        """The loop has begun to count; called before the first step."""
        held = self._held
        if held is None:
            return
        every = [held.ranks[rank]["loop"] for rank in sorted(held.ranks)]
        same = held.manifest.world_size == self.args.world_size
        own = every[sorted(held.ranks).index(self.args.process_index)] if same else every[0]
        self.load_loop_state({**own, "same_ranks": same}, every)
        if held.common["evaluation_is_due"]:
            self._evaluate(None, None, skip_scheduler=True)

    def set_data_epoch(self, epoch: int) -> None:
        """Tell the order of the rows which epoch it is."""

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # transformers 5.24 does not reach the order through the loader that skips what was trained on: in a resumed
        # epoch it would be that of the first one.
        self.set_data_epoch(epoch)
        # An epoch without an end, of a stream, would be begun anew behind the last step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    # Between steps.

    def on_step_begins(self) -> None:
        """Called before each step, when its data are there."""
        if self.survival.first_step and self.args.ignore_data_skip:
            # A stream goes on in the middle of its epoch, whose beginning has drawn from the generators once more.
            self._load_rng_state(None)
        self.survival.begin_step()
        self._losses, self._event = [], None
        self._loss_before = self._tr_loss.clone()
        self._lengths = {name: len(values) for name, values in getattr(self, "_metrics", {}).get("train", {}).items()}

    def on_step_ends(self, control: Any) -> None:
        """Called after each step: what went wrong is dealt with, and the ranks agree on what comes next."""
        if self._event is not None:
            self._deal_with(self._event)
        stop = self.survival.end_step(self.state.global_step)
        if stop:
            self._evaluation_is_due = control.should_evaluate
            control.should_evaluate, control.should_save = False, True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class; the random generators take no notice."""
        self.survival.watchdog.sign_of_life()
        with rng.undisturbed():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.survival.watchdog.sign_of_life()
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._evaluated = (self.state.global_step, numbers)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
            return metrics
        except EvaluationStopped:
            self._evaluation_is_due = True
            self.control.should_save = True
            return {}

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, unless a signal asks to stop."""
        self.leave_evaluation_if_asked()
        return super().prediction_step(*args, **kwargs)

    def leave_evaluation_if_asked(self) -> None:
        """Called before each batch of an evaluation, by all ranks."""
        self.survival.watchdog.sign_of_life()
        if self.survival.within_training and self.survival.asked_to_stop():
            raise EvaluationStopped

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base class; waiting for data is no hang."""
        return super().get_batch_samples(self.survival.watched(epoch_iterator), *args, **kwargs)

    # Wrong numbers.

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As the base class; the loss of a whole step is judged before its last backward pass."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not (model.training and self.survival.within_training):
            return found
        self._losses.append((found[0] if return_outputs else found).detach())
        if self.accelerator.sync_gradients:
            own = float(torch.stack(self._losses).sum())
            (total,) = self.survival.keeper.together.total([own])
            self._event = self.survival.guard.of_loss(total / self.args.world_size)
            self._gate.closed = self._event is not None
        return found

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._event is None and norm is not None:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._event = self.survival.guard.of_norm(float(whole))
            self._gate.closed = self._event is not None
        self._gate.settle()
        return norm

    def _deal_with(self, event: Event) -> None:
        """The step has changed no weight; leave it out of the means, too, and do what the recipe says."""
        self._gate.closed = False
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1
        for name, values in getattr(self, "_metrics", {}).get("train", {}).items():
            del values[self._lengths.get(name, 0) :]
        survival, step = self.survival, self.state.global_step
        survival.guard.events += 1
        held = survival.newest_to_roll_back_to() if event.action == "rollback" else None
        survival.record(event, step, self.samples_of_step(), held.manifest.step if held else None)
        if survival.guard.events > survival.guard.settings.max_events:
            survival.end_steps()
            raise UserError(
                f"guard.max_events: step {step} is the {survival.guard.events}th whose numbers are wrong, the last "
                f"time because {event.told()}; lower train.learning_rate, or mend the data (events.jsonl names them)"
            )
        if held is not None:
            with survival.watchdog.paused():
                self._states().load(held.reader(), held.steps)
        elif event.action != "skip":
            survival.end_steps()
            raise UserError(survival.stopped_for(event, step))


class _Boundaries(TrainerCallback):  # type: ignore[misc]
    """Tells a trainer where steps begin and end. It comes last, when others have said what they want."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.on_training_begins()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.on_step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.on_step_ends(control)
