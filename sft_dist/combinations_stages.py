"""Rules on the settings of the stages. A value equal to its default counts as not set."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config import DataSection, Recipe
from sft_dist.config_base import Section
from sft_dist.config_stages import DPOSection, PPOSection, RewardSection
from sft_dist.data.pair_formats import PAIR_STAGES, PREFERENCE
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
        # PPO packs prompts with their responses.
        if getattr(recipe.data, key) and (key, recipe.stage) != ("packing", "ppo"):
            yield f"data.{key}", f"is for stage=sft; stage={recipe.stage} has rows of its own, so leave it out"


@rule("stage", "data.format", "data.mixture")
def _format_of_the_stage(recipe: Recipe) -> Iterator[Finding]:
    given = {"data.format": recipe.data.format}
    given |= {f"data.mixture.{name}.format": source.format for name, source in (recipe.data.mixture or {}).items()}
    for key, form in given.items():
        if form == PREFERENCE and recipe.stage == "sft":
            yield key, "preference records are for stage=reward or stage=dpo; set one of these, or another format"
        elif form not in ("auto", PREFERENCE) and recipe.stage in PAIR_STAGES:
            yield key, f"stage={recipe.stage} trains on pairs; set {PREFERENCE}, or leave it out"


@rule("stage", "data.truncation_mode", "data.min_response_length", "data.max_response_length")
def _pairs_are_never_cut(recipe: Recipe) -> Iterator[Finding]:
    if recipe.stage not in PAIR_STAGES:
        return
    default = DataSection.model_fields["truncation_mode"].default
    if recipe.data.truncation_mode not in (default, "drop"):
        yield "data.truncation_mode", "a pair that is too long is dropped, never cut; leave it out"
    for key in ("min_response_length", "max_response_length"):
        if getattr(recipe.data, key) is not None:
            yield f"data.{key}", f"has no effect on pairs, on which stage={recipe.stage} trains; leave it out"
