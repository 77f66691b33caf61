"""Settings of DPO that cannot stand together (see `combinations`)."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config import Recipe
from sft_dist.config_stages import DPOSection
from sft_dist.rules import Finding, rule

_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# Losses of differences of rewards, in which what a divergence adds to both sides is no more.
_OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SORTING = ("aot", "aot_unpaired")


def _given(recipe: Recipe, key: str) -> bool:
    return bool(getattr(recipe.dpo, key) != DPOSection.model_fields[key].get_default())


@rule("stage", "dpo.loss_type", "dpo.loss_weights")
def _a_weight_for_each_loss(recipe: Recipe) -> Iterator[Finding]:
    losses, weights = recipe.dpo.loss_type, recipe.dpo.loss_weights
    if weights is not None and len(weights) != len(losses):
        yield (
            "dpo.loss_weights",
            f"{len(weights)} for the {len(losses)} of dpo.loss_type ({', '.join(losses)}); give one for each",
        )
    twice = next((loss for loss in losses if losses.count(loss) > 1), None)
    if twice is not None:
        yield "dpo.loss_type", f"{twice} stands there twice; name it once, with its weight in dpo.loss_weights"


@rule("stage", "dpo.loss_type", "dpo.label_smoothing")
def _smoothing_of_losses(recipe: Recipe) -> Iterator[Finding]:
    losses, smoothing, key = recipe.dpo.loss_type, recipe.dpo.label_smoothing, "dpo.label_smoothing"
    if smoothing and not set(losses) & set(_SMOOTHED):
        yield key, f"has no effect on {', '.join(losses)}; take {', '.join(_SMOOTHED)}, or leave it out"
    if "robust" in losses and smoothing >= 0.5:
        yield key, f"robust needs less than 0.5, got {smoothing}: at that, labels say nothing"
    if "exo_pair" in losses and not smoothing:
        yield key, "exo_pair needs more than 0; its paper takes 0.001"


@rule("stage", "dpo.loss_type", "dpo.discopop_tau")
def _temperature_of_discopop(recipe: Recipe) -> Iterator[Finding]:
    if _given(recipe, "discopop_tau") and "discopop" not in recipe.dpo.loss_type:
        yield "dpo.discopop_tau", "has no effect without discopop in dpo.loss_type; leave it out"


@rule("stage", "dpo.loss_type", "dpo.f_divergence_type", "dpo.f_alpha_divergence_coef")
def _divergence_of_losses(recipe: Recipe) -> Iterator[Finding]:
    kind, key = recipe.dpo.f_divergence_type, "dpo.f_divergence_type"
    others = [loss for loss in recipe.dpo.loss_type if loss not in _OF_DIFFERENCES]
    if kind != "reverse_kl" and others:
        yield key, f"{kind} is no divergence for {others[0]}, which is no loss of a difference; take reverse_kl"
    if _given(recipe, "f_alpha_divergence_coef") and kind != "alpha_divergence":
        yield "dpo.f_alpha_divergence_coef", f"has no effect with {kind}; set {key}=alpha_divergence or leave it out"


@rule("stage", "dpo.loss_type", "dpo.use_weighting")
def _weighted_pairs(recipe: Recipe) -> Iterator[Finding]:
    for loss in recipe.dpo.loss_type if recipe.dpo.use_weighting else []:
        if loss in _SORTING:
            yield "dpo.use_weighting", f"{loss} sorts the pairs, so that none has a weight; leave it out"
        if loss == "sft":
            yield "dpo.use_weighting", "sft is a mean over tokens, and weights are those of pairs; leave one out"


@rule("stage", "dpo.precompute_ref_log_probs", "dpo.precompute_ref_batch_size")
def _batches_of_the_reference(recipe: Recipe) -> Iterator[Finding]:
    if recipe.dpo.precompute_ref_batch_size is not None and not recipe.dpo.precompute_ref_log_probs:
        yield (
            "dpo.precompute_ref_batch_size",
            "has no effect while dpo.precompute_ref_log_probs is false; set that to true or leave this out",
        )


@rule("stage", "dpo.precompute_ref_log_probs", "data.streaming")
def _a_stream_is_not_known_beforehand(recipe: Recipe) -> Iterator[Finding]:
    if recipe.dpo.precompute_ref_log_probs and recipe.data.streaming:
        yield "dpo.precompute_ref_log_probs", "cannot stand with data.streaming, whose pairs come while training"


@rule("stage", "dpo.ref_model", "dpo.ref_model_revision", "peft.use_peft")
def _one_reference(recipe: Recipe) -> Iterator[Finding]:
    if recipe.dpo.ref_model is not None and recipe.peft.use_peft:
        yield "dpo.ref_model", "with peft.use_peft the reference is the model with its adapter off; leave it out"
    if _given(recipe, "ref_model_revision") and recipe.dpo.ref_model is None:
        yield "dpo.ref_model_revision", "has no effect without dpo.ref_model; name that or leave this out"


@rule("stage", "peft.lora_target_modules", "peft.use_peft")
def _no_adapter_on_the_head(recipe: Recipe) -> Iterator[Finding]:
    modules = recipe.peft.lora_target_modules
    if recipe.stage == "dpo" and isinstance(modules, list) and "lm_head" in modules:
        yield "peft.lora_target_modules", "lm_head is read past an adapter, which would never learn; leave it out"


@rule("stage", "parallel.offload_nvme_path", "dpo.precompute_ref_log_probs", "peft.use_peft")
def _one_model_on_a_disk(recipe: Recipe) -> Iterator[Finding]:
    alone = recipe.peft.use_peft or recipe.dpo.precompute_ref_log_probs
    if recipe.stage == "dpo" and recipe.parallel.offload_nvme_path is not None and not alone:
        yield (
            "parallel.offload_nvme_path",
            "DeepSpeed keeps one model there, and the reference is a second; set dpo.precompute_ref_log_probs=true",
        )
