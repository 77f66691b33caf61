"""W&B and TensorBoard of a run, which stays one run for them however often it is stopped, killed and resumed.

A resumed run does the steps after its checkpoint again. TensorBoard is told to discard what it had of them. W&B
keeps what it has and is given the steps that it lacks: it writes with a delay, so that steps before the checkpoint
may be lost with a process that is killed; those come from `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

from sft_dist.config import Recipe
from sft_dist.metrics_file import LogFile, Outage, records
from sft_dist.rundir import RunDir, write_text
from sft_dist.wandb_log import last_step

if TYPE_CHECKING:
    import wandb

# Seconds between attempts to write to TensorBoard's folder again; each makes a file.
_PATIENCE = 60.0


def callbacks(recipe: Recipe, run: RunDir, resumed_step: int | None) -> list[TrainerCallback]:
    """What logs a run, for rank 0: the recipe's trackers and then `metrics.jsonl`.

    `resumed_step`: the step of the checkpoint that the run goes on from, None for a first start. `metrics.jsonl`
    must hold no later steps (:func:`sft_dist.metrics_file.rewind_metrics`), and :func:`prepare` comes before.
    """
    makers: dict[str, Callable[[], TrainerCallback]] = {
        "wandb": lambda: OneWandbRun(run.metrics, resumed_step),
        "tensorboard": lambda: OneTensorBoard(resumed_step),
    }
    return [*(makers[name]() for name in recipe.train.report_to), LogFile(run.metrics)]


def prepare(recipe: Recipe, run: RunDir, is_main: bool) -> None:
    """Tell W&B and TensorBoard where to write, W&B whether it has a key to be online with, and which run this is."""
    os.environ.setdefault("WANDB_PROJECT", "sft-dist")
    os.environ.setdefault("WANDB_DIR", str(run.root))
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.root / "tensorboard"))
    # What W&B has not yet written when the process is killed is lost: by default, 15 seconds of it.
    os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    if is_main and "wandb" in recipe.train.report_to:
        os.environ["WANDB_RUN_ID"] = wandb_run_id(run, recipe.output.resume, os.environ.get("WANDB_RUN_ID"))
        os.environ.setdefault("WANDB_RESUME", "allow")


def wandb_run_id(run: RunDir, resume: bool, given: str | None) -> str:
    """The id of the run for W&B: the user's own, that of the run's earlier start, or a new one. It is kept."""
    kept = _kept_run_id(run.tracker) if resume else None
    name = given or kept or secrets.token_hex(8)
    if name != kept:
        write_text(run.tracker, json.dumps({"wandb_run_id": name}) + "\n")
    return name


def _kept_run_id(path: Path) -> str | None:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["wandb_run_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) and name else None


def _has_wandb_key() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class OneTensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """TensorBoard, where steps that are done again replace those of an earlier start.

    Where its files cannot be written, their records are left out and the training goes on.
    """

    def __init__(self, resumed_step: int | None) -> None:
        super().__init__()
        self.tb_writer: Any = None
        self._purge_step = None if resumed_step is None else resumed_step + 1
        self._outage = Outage("tensorboard")
        self._next_attempt = 0.0
        _quiet_writing_threads()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        self._attempt(super().on_train_begin, args, state, control, **more)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        if logs:
            self._attempt(super().on_log, args, state, control, logs=logs, **more)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        self._attempt(super().on_train_end, args, state, control, **more)

    def _attempt(self, event: Callable[..., None], args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero or time.monotonic() < self._next_attempt:
            return
        try:
            if self.tb_writer is None and self.logging_dir is not None:
                self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=self._purge_step)
            event(args, state, control, **more)
        except OSError as error:
            self._outage.begins(error, "its records are left out until it can")
            # Its thread has ended with the error, and every further call would raise it.
            with contextlib.suppress(OSError):
                if self.tb_writer is not None:
                    self.tb_writer.close()
            self.tb_writer = None
            self._next_attempt = time.monotonic() + _PATIENCE
        else:
            # A second time it would discard what was written since.
            self._purge_step = None
            self._outage.ends()


def _quiet_writing_threads() -> None:
    """TensorBoard's thread passes its error on to the caller and dies of it, which needs no traceback."""
    shown = threading.excepthook

    def show(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            shown(args)

    threading.excepthook = show


class OneWandbRun(WandbCallback):  # type: ignore[misc]
    """W&B, where each record is filed under its optimizer step, and a step that is there is not logged again.

    Where it fails, its records are left out and the training goes on.
    """

    def __init__(self, metrics: Path, resumed_step: int | None) -> None:
        super().__init__()
        self._metrics = metrics
        self._resumed = resumed_step is not None
        import wandb

        self._wandb = self._filed = _Filed(wandb)
        self._outage = Outage("W&B")

    def setup(self, args: Any, state: TrainerState, model: Any, **more: Any) -> None:
        super().setup(args, state, model, **more)
        if state.is_world_process_zero and self._resumed:
            self._filed.first = first_missing_step(self._wandb.run)
            for step, logs in records(self._metrics):
                then = copy.copy(state)
                then.global_step = step
                super().on_log(args, then, None, model=model, logs=logs)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        if not logs:
            return
        try:
            super().on_log(args, state, control, model=model, logs=logs, **more)
        except (OSError, self._wandb.Error) as error:
            self._outage.begins(error, "its records are left out until it can")
        else:
            self._outage.ends()


class _Filed:
    """The module `wandb`, with a `log` that takes the optimizer step out of the record.

    transformers' callback lets W&B count the calls, by which no record could be told from its repetition.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.first = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def log(self, record: dict[str, Any]) -> None:
        step = record.get("train/global_step")
        if step is None:
            self._module.log(record)
        elif step >= self.first:
            self._module.log(record, step=step)


def first_missing_step(run: wandb.Run) -> int:
    """The first step that W&B lacks: by its server, or, without one, by the logs that earlier starts left."""
    if not run.offline:
        return run.starting_step
    logs = Path(run.settings.sync_dir).parent.glob(f"*run-*-{glob.escape(run.id)}/*.wandb")
    return max((last_step(log) for log in logs), default=-1) + 1
