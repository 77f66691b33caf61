"""The trainings that a recipe can ask for, each a module: its data, its trainer, what it is measured by, its report.

The worker knows the flow that they share (see `sft_dist.worker`), a stage what is its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_dist.backend import Backend
    from sft_dist.checkpoints.keeper import Held
    from sft_dist.config import Recipe
    from sft_dist.data.template import ChatTemplate
    from sft_dist.rundir import RunDir
    from sft_dist.trainers.ordered import Ordered
    from sft_dist.world import World


@dataclass(frozen=True)
class Setting:
    """What one process of a run works with before data and model are there.

    `path`: of the model. `config`: transformers' of it. `limit`: tokens of the longest row, None for no limit.
    `bar`: a progress bar instead of plain lines. `say` prints on one process only.
    """

    recipe: Recipe
    run: RunDir
    world: World
    path: str
    tokenizer: PreTrainedTokenizerBase
    config: Any
    template: ChatTemplate
    limit: int | None
    backend: Backend
    bf16: bool
    bar: bool
    say: Callable[[str], None]


class Stage(Protocol):
    """A training in a process, of which the worker calls the methods in this order."""

    trainer: Ordered

    def prepare_data(self) -> list[str]:
        """Make the rows, or find them in the cache. Returns lines that tell people of them."""

    def make_trainer(self) -> None:
        """Load the model and set `trainer`. All ranks call it together."""

    def arrange(self, held: Held | None, ending: ExitStack) -> None:
        """Settle the rows and their order. `held`: the checkpoint to go on from; `ending` closes what is opened."""

    def measure(self, when: str) -> Any:
        """What the model is measured by, a dataclass, or None; all ranks take part. `when`: before, after."""

    def save(self) -> None:
        """Write the trained model to its place. All ranks call it together."""

    def report(self, after: Any, seconds: float) -> None:
        """Write summary and report, and show them; on one process. `seconds`: of the whole run."""


def stage_of(setting: Setting) -> Stage:
    """The stage that a recipe asks for, of which alone the libraries are loaded."""
    name = setting.recipe.stage
    kind = getattr(importlib.import_module(f"sft_dist.stages.{name}"), _CLASSES[name])
    found: Stage = kind(setting)
    return found


_CLASSES = {"sft": "SFTStage", "reward": "RewardStage", "dpo": "DPOStage", "ppo": "PPOStage"}
