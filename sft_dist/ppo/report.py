"""What a PPO run leaves for people: the summary, and the measure before and after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sft_dist.data.account import Account
from sft_dist.rundir import write_text
from sft_dist.stages import Setting

if TYPE_CHECKING:
    from sft_dist.trainers.ppo import PPOTrainer


def write_report(setting: Setting, trainer: PPOTrainer, train: Account, after: Any, seconds: float) -> None:
    write_text(setting.run.summary, json.dumps({"after": after and after.numbers}, indent=2) + "\n")
