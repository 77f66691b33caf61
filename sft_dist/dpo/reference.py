"""The reference that the policy is held to: a model of its own, or the policy with its adapter switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from trl.trainer.utils import add_fused_lm_head

from sft_dist import builtin_models, fsdp2
from sft_dist.backend import HIERARCHICAL
from sft_dist.config import Recipe
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.dpo.batch import Batch
from sft_dist.dpo.likeness import other_model, other_vocabulary
from sft_dist.dpo.scoring import log_probs
from sft_dist.errors import UserError
from sft_dist.loading import load_trained_model
from sft_dist.models import load_config, switch_dropout_off

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sft_dist.stages import Setting


class Reference(Protocol):
    """Says what the policy is compared with, without gradients. All ranks call it together."""

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """As :func:`sft_dist.dpo.scoring.log_probs`."""

    def logits(self, inputs: Batch) -> torch.Tensor:
        """Of `input_ids` and `attention_mask`, (rows, T, vocabulary)."""


@dataclass(frozen=True)
class _AtWork:
    """A model that is a reference for as long as `_at_work` is open."""

    def _at_work(self) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """As the protocol's."""
        with self._at_work() as model:
            return log_probs(model, batch)

    def logits(self, inputs: Batch) -> torch.Tensor:
        """As the protocol's."""
        with self._at_work() as model:
            found: torch.Tensor = model(**inputs, use_cache=False).logits
            return found


@dataclass(frozen=True)
class FullReference(_AtWork):
    """A frozen model. `bf16`: computes in bf16 by autocast; `sharded`: its shards are FSDP2's."""

    model: Any
    device: torch.device
    bf16: bool
    sharded: bool

    @contextmanager
    def _at_work(self) -> Iterator[Any]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield self.model
        if self.sharded:
            # Nothing comes behind that would: what is around the layers is gathered until a backward pass.
            fsdp2.reshard(self.model)


@dataclass(frozen=True)
class AdapterOff(_AtWork):
    """A model of peft as it was before its adapter. `bf16`: computes in bf16 by autocast."""

    model: Any
    device: torch.device
    bf16: bool

    @contextmanager
    def _at_work(self) -> Iterator[Any]:
        training = self.model.training
        # No dropout, and nothing is recomputed.
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
                self.model.disable_adapter(),
            ):
                yield self.model
        finally:
            self.model.train(training)


def adapter_off(model: Any, setting: Setting, device: torch.device) -> AdapterOff:
    """The reference of a policy with an adapter."""
    return AdapterOff(model, device, _autocast(setting))


def load_reference(setting: Setting, args: TrainingArguments) -> FullReference:
    """The reference of a recipe as a model of its own, sharded where the backend shards weights.

    All ranks call it together. Raises :class:`UserError` where it is no model to compare the policy with.
    """
    recipe, backend, path = _recipe_of_reference(setting.recipe), setting.backend, reference_path(setting.recipe)
    refuse_other_model(setting)
    if backend.stage == 3:
        backend = replace(backend, node_shards=False)
    with _one_level(args):
        model = load_trained_model(path, recipe, setting.tokenizer, backend, setting.world, setting.bf16, setting.say)
        model.requires_grad_(False)
        model.eval()
        switch_dropout_off(model)
        add_fused_lm_head(model)
        if backend.stage == 3:
            model = _zero3(model, args)
    if not backend.shards_weights and not recipe.peft.load_in_4bit:
        # DeepSpeed casts the policy's weights; those of the reference compute in the same type.
        model.to(args.device, torch.bfloat16 if setting.bf16 and backend.kind == "deepspeed" else None)
    return FullReference(model, args.device, _autocast(setting), backend.kind == "fsdp2")


def reference_path(recipe: Recipe) -> str:
    """The folder or the hub's name of the reference."""
    return builtin_models.resolve(recipe.dpo.ref_model or recipe.model.model_name_or_path)


def refuse_other_model(setting: Setting) -> None:
    """Raise :class:`UserError` where the reference has another architecture or vocabulary than the policy."""
    name = setting.recipe.dpo.ref_model
    if name is None:
        return
    path, section = reference_path(setting.recipe), _recipe_of_reference(setting.recipe).model
    try:
        config = load_config(path, section)
        tokenizer = load_tokenizer(path, section)
    except UserError as error:
        raise UserError(str(error).replace("model.model_name_or_path", "dpo.ref_model", 1)) from error
    policy = setting.recipe.model.model_name_or_path
    fault = other_model(setting.config.to_dict(), config.to_dict(), policy)
    fault = fault or other_vocabulary(setting.tokenizer.get_vocab(), tokenizer.get_vocab(), policy)
    if fault:
        raise UserError(f"dpo.ref_model: {name}: {fault}")


def _recipe_of_reference(recipe: Recipe) -> Recipe:
    """The recipe by which the reference is loaded as the policy is, whole and without what only training needs."""
    changed: dict[str, Any] = {
        "peft": recipe.peft.model_copy(update={"use_peft": False}),
        "train": recipe.train.model_copy(update={"gradient_checkpointing": False}),
    }
    if recipe.dpo.ref_model is not None:
        other = {"model_name_or_path": recipe.dpo.ref_model, "model_revision": recipe.dpo.ref_model_revision}
        changed["model"] = recipe.model.model_copy(update=other)
    return recipe.model_copy(update=changed)


def _autocast(setting: Setting) -> bool:
    # Weights under DeepSpeed are in bf16 themselves.
    return setting.bf16 and setting.backend.kind != "deepspeed"


@contextmanager
def _one_level(args: TrainingArguments) -> Iterator[None]:
    """Shard over all processes where the policy is sharded within nodes: DeepSpeed makes those groups once."""
    # The arguments have it under DeepSpeed only.
    settings = getattr(args, "hf_deepspeed_config", None)
    held = settings.config["zero_optimization"] if settings is not None else {}
    nodes = held.pop(HIERARCHICAL, None)
    try:
        yield
    finally:
        if nodes is not None:
            held[HIERARCHICAL] = nodes


def _zero3(model: Any, args: TrainingArguments) -> Any:
    """An engine of DeepSpeed's that gathers layers and trains nothing."""
    import deepspeed

    config = deepcopy(args.hf_deepspeed_config.config)
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
