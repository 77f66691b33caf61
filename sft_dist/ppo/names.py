"""What a recipe names as rewards. Free of torch: the recipe's check asks, too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.config_stages import PPOSection

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class RewardName:
    """One reward. `key`: of the recipe, for messages; `source`: a model's folder or hub id, or a function's path."""

    name: str
    key: str
    source: str
    weight: float

    @property
    def is_function(self) -> bool:
        """Whether it is `package.module:function`."""
        return bool(FUNCTION.fullmatch(self.source))


def reward_names(settings: PPOSection) -> list[RewardName]:
    """The rewards of a recipe, in its order."""
    if settings.reward is not None:
        return [RewardName("reward", "ppo.reward", settings.reward, 1.0)]
    return [
        RewardName(name, f"ppo.rewards.{name}.{'model' if source.model else 'function'}",
                   source.model or source.function or "", source.weight)
        for name, source in (settings.rewards or {}).items()
    ]  # fmt: skip


def value_source(settings: PPOSection, policy: str, rewards: Sequence[str]) -> str:
    """What the value model begins from: what is named, else the first reward model, else the policy.

    `rewards`: the reward models that read the policy's own tokens, as the value model does.
    """
    return settings.value_model_name_or_path or next(iter(rewards), policy)
