"""Rules on the settings of the stages. A value equal to its default counts as not set."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config import Recipe
from sft_dist.config_base import Section
from sft_dist.config_stages import DPOSection, PPOSection, RewardSection
from sft_dist.rules import Finding, rule

_SECTIONS: dict[str, type[Section]] = {"reward": RewardSection, "dpo": DPOSection, "ppo": PPOSection}


@rule("stage", *(f"{name}.{key}" for name, section in _SECTIONS.items() for key in section.model_fields))
def _settings_of_the_stage(recipe: Recipe) -> Iterator[Finding]:
    for name, kind in _SECTIONS.items():
        section = getattr(recipe, name)
        for key, field in kind.model_fields.items():
            if recipe.stage != name and getattr(section, key) != field.get_default():
                yield f"{name}.{key}", f"has no effect while stage is {recipe.stage}; set stage={name} or leave it out"


@rule("stage", "data.packing", "data.streaming")
def _rows_of_the_stage(recipe: Recipe) -> Iterator[Finding]:
    if recipe.stage == "sft":
        return
    for key in ("packing", "streaming"):
        if getattr(recipe.data, key):
            yield f"data.{key}", f"is for stage=sft; stage={recipe.stage} has rows of its own, so leave it out"
