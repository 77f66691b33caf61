"""Policy, value, reference and reward models in one module, so that what shards and wraps models sees one of them.

With a LoRA adapter there is one set of frozen weights: the policy is the model with its adapter, the reference the
same without, and the value model the same with an adapter of its own and a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft_dist.attention import Way
from sft_dist.models import switch_dropout_off
from sft_dist.ppo.batches import Batch, bare, inputs_of, selected, selecting
from sft_dist.ppo.formulas import entropy_of, log_probs_of
from sft_dist.ppo.lora import AdapterReward

POLICY, VALUE = "default", "value"


class Actors(nn.Module):
    """The models of a PPO run. Only the policy and the value are trained.

    `policy`: a causal language model, with adapters where it has them. `value`: a model for sequence classification,
    or None where a head of its own (`value_head`) reads the policy's hidden states, or those of the value adapter.
    `reference`: a frozen causal model, None where it is the policy without its adapter. `rewards`: frozen models for
    sequence classification, or :class:`AdapterReward`. `temperature`: of the distribution that is drawn from and
    trained. `way`: how packed rows are fed to policy, value and reference; None: rows are not packed.
    """

    def __init__(
        self, policy: Any, value: Any, value_head: nn.Linear | None, reference: Any, rewards: list[Any],
        temperature: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.value, self.value_head, self.reference = policy, value, value_head, reference
        self.rewards = nn.ModuleList(rewards)
        self.temperature = temperature or 1.0
        self.way: Way | None = None
        self.config = policy.config
        parts = [part for part in (policy, value, reference, *rewards) if part is not None]
        self._no_split_modules = {
            name for part in parts for name in getattr(bare(part), "_no_split_modules", None) or ()
        }
        for part in (reference, *rewards):
            if part is not None:
                part.requires_grad_(False)
                if hasattr(part, "config"):
                    # Not all models of all kinds take it as an argument.
                    part.config.use_cache = False
        for part in parts:
            # The ratio of a policy to itself has to be one (Huang et al. 2024).
            switch_dropout_off(part)

    def train(self, mode: bool = True) -> Actors:
        """As the base class. The trainer asks for it before every micro-batch, and there are many modules to tell."""
        return self if mode == self.training else super().train(mode)

    def forward(self, call: str, **inputs: Any) -> Any:
        """The one way in, where shards are gathered: `train`, `look` and `reward` (see below), or `begin`, for none."""
        calls: dict[str, Callable[..., Any]] = {"train": self.train_pass, "look": self.look, "reward": self.reward}
        return calls[call](**inputs) if call in calls else None

    def train_pass(self, batch: Batch, entropy: bool, ptx: Batch | None = None) -> dict[str, torch.Tensor]:
        """`log_probs`, `values` and `entropy` of the responses of a batch, each (rows, width); see `batch_of`.

        `entropy`: whether its gradient is wanted. `ptx`: further rows, of which `ptx_log_probs` (rows, length - 1) are
        those of their tokens.
        """
        found = self._policy_pass(batch, want_entropy_gradient=entropy)
        if ptx is not None:
            logits = self.policy(**ptx, use_cache=False).logits
            found["ptx_log_probs"] = log_probs_of(logits[:, :-1], ptx["input_ids"][:, 1:])
        return found

    @torch.no_grad()
    def look(self, batch: Batch) -> dict[str, torch.Tensor]:
        """As `train_pass`, without gradients, and `reference`, the log-probabilities of the reference."""
        found = self._policy_pass(batch, want_entropy_gradient=False)
        if self.reference is not None:
            found["reference"] = log_probs_of(self._logits(self.reference, batch)[0], batch["responses"])
        else:
            with adapters(self.policy, None):
                found["reference"] = log_probs_of(self._logits(self.policy, batch)[0], batch["responses"])
        return found

    @torch.no_grad()
    def reward(self, number: int, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The rewards (rows,) of a reward model for rows of tokens (rows, length), which are padded on the right."""
        model = self.rewards[number]
        if isinstance(model, AdapterReward):
            with adapters(self.policy, model.adapter):
                base = bare(self.policy).base_model
                hidden = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            # As transformers does it: the last token that is no padding, even where padding is what ends a text.
            places = torch.arange(input_ids.shape[1], device=hidden.device)
            last = hidden[
                torch.arange(len(hidden), device=hidden.device), (places * (input_ids != model.pad)).argmax(1)
            ]
            scores: torch.Tensor = model.head(last.to(model.head.weight.dtype))
        else:
            scores = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return scores.squeeze(-1).float()

    def _policy_pass(self, batch: Batch, want_entropy_gradient: bool) -> dict[str, torch.Tensor]:
        shared = self.value is None and not self._has_value_adapter
        logits, hidden = self._logits(self.policy, batch)
        with torch.set_grad_enabled(want_entropy_gradient and torch.is_grad_enabled()):
            entropy = entropy_of(logits)
        values = self._values(batch, hidden if shared else None)
        return {"log_probs": log_probs_of(logits, batch["responses"]), "entropy": entropy, "values": values}

    def _logits(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (responses, width, vocabulary) of each token of the responses, tempered, and the hidden states
        (responses, width, hidden) that they come from."""
        with selecting(bare(model).get_output_embeddings(), batch, self.way) as seen:
            logits = model(**inputs_of(model, batch, self.way)).logits.float()
        return logits if self.temperature == 1.0 else logits / self.temperature, seen[0]

    def _values(self, batch: Batch, before: torch.Tensor | None) -> torch.Tensor:
        """The value of the state before each token of the responses, (responses, width).

        `before`: the policy's hidden states there, where it shares them.
        """
        if before is None and self.value is not None:
            before = _trunk(self.value, batch, self.way)
        elif before is None:
            with adapters(self.policy, VALUE):
                before = _trunk(bare(self.policy), batch, self.way)
        head = self.value_head if self.value_head is not None else self.value.score
        values: torch.Tensor = head(before.to(head.weight.dtype)).squeeze(-1).float()
        return values

    @property
    def _has_value_adapter(self) -> bool:
        return VALUE in getattr(self.policy, "peft_config", {})

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:  # fmt: skip
        """Recompute activations of what is trained, with the adapters that were on at first."""
        options = {**(activation_checkpointing_kwargs or {}), "context_fn": self.recomputing}
        for part in (self.policy, self.value):
            if part is not None:
                model = bare(part)
                if hasattr(model, "activation_checkpointing_enable"):
                    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **more)
                else:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As transformers called it once."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def recomputing(self) -> tuple[Any, Any]:
        """Contexts of a layer's forward pass and of its recomputation, which comes when other adapters are on."""
        now = active(self.policy)
        return adapters(self.policy, now), adapters(self.policy, now)


def _trunk(model: Any, batch: Batch, way: Way | None) -> torch.Tensor:
    """The hidden states behind the last layer before each token of the responses, (responses, width, hidden)."""
    return selected(model.base_model(**inputs_of(model, batch, way)).last_hidden_state, batch, way)


def active(model: Any) -> str | None:
    """The adapter of a model that is on, None where it has none or it is off."""
    for layer in _adapted(model):
        return None if layer._disable_adapters else layer._active_adapter[0]
    return None


@contextmanager
def adapters(model: Any, name: str | None) -> Iterator[None]:
    """Have one adapter on, or none. Unlike peft's own switches it leaves alone which weights are trained."""
    layers = _adapted(model)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (off, on) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = off, on


def _adapted(model: Any) -> list[Any]:
    """The layers of a model that have adapters, kept where the model is."""
    if not hasattr(model, "peft_config"):
        return []
    found: list[Any] | None = model.__dict__.get("_sft_dist_adapted")
    if found is None:
        found = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
        # Not as an attribute: torch would take the modules for children.
        model.__dict__["_sft_dist_adapted"] = found
    return found
