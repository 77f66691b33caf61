"""Responses by vLLM on the training's own GPUs, given the policy's weights before each rollout.

The responses are drawn by vLLM's own chances, seeded for each prompt, so that they are others than those of the
transformers generator, and differ with vLLM's version. What is trained is the same: log-probabilities are always
those of the policy itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sft_dist.errors import UserError
from sft_dist.ppo.actors import POLICY
from sft_dist.ppo.sampling import Ids, up_to_stop
from sft_dist.straight import plain_name

# Of the GPU's memory, while responses are made; training has it back afterwards.
_SHARE = 0.5


class VLLM:
    """An engine in each process, which sleeps while the policy is trained."""

    def __init__(self, policy: Any, accelerator: Any, tokenizer: Any, longest: int | None) -> None:
        if not torch.cuda.is_available():
            raise UserError("ppo.generator: vllm needs a GPU, and there is none; take transformers")
        try:
            from trl.generation.vllm_generation import VLLMGeneration
        except ImportError as error:
            raise UserError(f"ppo.generator: vllm cannot be used here ({error}); take transformers") from error
        self._engine = VLLMGeneration(policy, accelerator, tokenizer, mode="colocate", enable_sleep_mode=True,
                                      gpu_memory_utilization=_SHARE, max_model_length=longest)  # fmt: skip
        # Theirs merges an adapter into the weights and out again, which leaves them rounded.
        self._engine._iter_named_params = lambda: merged_weights(policy)

    def begin(self) -> None:
        """Hand over the policy's weights, which are whole on this process."""
        self._engine.sync_weights()
        self._engine.llm.wake_up(tags=["kv_cache"])

    def end(self) -> None:
        """Give the memory back."""
        self._engine.llm.sleep(level=2)

    def respond(
        self, _: Any, prompts: Sequence[Ids], numbers: torch.Tensor | None, tokens: int, temperature: float,
        stops: Sequence[int], pad: int, alive: Callable[[], None],
    ) -> list[Ids]:  # fmt: skip
        """As :func:`sft_dist.ppo.sampling.respond`; the first of a prompt's numbers is its seed."""
        from vllm import SamplingParams

        alive()
        settings = [
            SamplingParams(
                max_tokens=tokens,
                temperature=temperature,
                stop_token_ids=list(stops),
                seed=None if numbers is None else int(numbers[row, 0] * 2**31),
            )
            for row in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._engine.llm.generate(asked, sampling_params=settings, use_tqdm=False)
        return [up_to_stop(list(output.outputs[0].token_ids), stops) for output in outputs]


def merged_weights(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a policy by the names of the model without an adapter, its adapter added to copies of them."""
    layers = {
        name: module for name, module in policy.named_modules() if POLICY in getattr(module, "lora_A", ())
    }  # fmt: skip
    for name, parameter in policy.named_parameters():
        owner, _, kind = name.rpartition(".")
        if "lora_" in name or "original_module" in name:
            continue
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        layer = layers.get(owner.removesuffix(".base_layer"))
        if layer is not None and kind == "weight":
            value = value + layer.get_delta_weight(POLICY).to(value.dtype)
        yield plain_name(name), value.detach()
