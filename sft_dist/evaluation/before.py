"""The measure that is taken before the first step."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from sft_dist.rundir import RunDir, write_text

if TYPE_CHECKING:
    from sft_dist.stages import Stage


class BeforeTraining(TrainerCallback):  # type: ignore[misc]
    """Takes a stage's measure when the trainer has wrapped the model, and before its first step.

    Not before `train()`: accelerate then marks the bare model as prepared and does not wrap it for data
    parallelism later, so that every rank silently trains a model of its own (transformers 5.24).
    A resumed run keeps the result of its first start.
    """

    def __init__(self, stage: Stage, run: RunDir, enabled: bool) -> None:
        self.stage, self.run, self.enabled = stage, run, enabled

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.enabled and state.global_step == 0:
            result = self.stage.measure("before")
            if result is not None and state.is_world_process_zero:
                write_text(self.run.before, json.dumps(asdict(result), indent=2) + "\n")
        self.stage.trainer.throughput.start()
