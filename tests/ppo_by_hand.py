"""A step of PPO by hand: a Llama of one layer in NumPy, its derivatives by small differences, plain SGD.

Nothing here is torch's: forward pass, losses, gradients and update are arithmetic in float64 (for the formulas see
`ppo_reference`). The language has two tokens, the letter a and the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests import letters, ppo_reference
from tests.recipes import write_recipe

Weights = dict[str, np.ndarray]
Rows = list[list[float]]
HIDDEN, HEADS, ROOM = 4, 2, 4
EPSILON = 1e-5
# As many of PPO's settings as one run can have at once, with ranges that clip much.
SETTINGS: dict[str, Any] = {
    "response_length": ROOM, "temperature": 0.8, "rollout_batch_size": 8, "num_ppo_epochs": 2, "gamma": 0.9,
    "lam": 0.8, "kl_coef": 0.3, "kl_estimator": "k3", "kl_target": 3.0, "kl_horizon": 40, "cliprange": 0.05,
    "cliprange_value": 0.05, "vf_coef": 0.5, "entropy_coef": 0.02, "whiten_rewards": True, "reward_norm": True,
    "reward_clip": 1.2, "missing_eos_penalty": 0.25, "length_target": 2, "length_penalty": 0.1,
}  # fmt: skip
RATE, MOST_NORM = 0.1, 0.5
ROWS, STEPS_PER_ROLLOUT = 4, 4


def half(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward: best for two letters."""
    return [1 - abs(len(text) - 2) / 2 for text in completions]


def prepare(folder: Path) -> Path:
    """The models, and the recipe of a run of two rollouts whose every step is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    words = letters.tokenizer("a", ["<end>"])
    config = LlamaConfig(
        **{**letters.sizes(words), "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 1},
        num_key_value_heads=1, intermediate_size=6, tie_word_embeddings=True, initializer_range=0.7, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("value", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return write_recipe(
        folder / "by-hand.yaml",
        stage="ppo",
        model={"model_name_or_path": str(folder / "policy")},
        data={"dataset_name": str(letters.write_prompts(folder / "a.jsonl", 8, letters="a"))},
        ppo={
            **SETTINGS,
            "reward": "tests.ppo_by_hand:half",
            "value_model_name_or_path": str(folder / "value"),
        },
        train={"max_length": 16, "per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": RATE,
               "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": MOST_NORM, "logging_steps": 1,
               "bf16": False, "save_strategy": "steps", "save_steps": 1, "report_to": "none"},
        checkpoint={"keep": None},
        parallel={"global_batch_size": ROWS},
        output={"output_dir": str(folder / "by-hand")},
        eval={"enabled": False},
    )  # fmt: skip


# The model.


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def _rotated(x: np.ndarray) -> np.ndarray:
    """Positions as rotations of pairs, (tokens, width of a head), the pairs being half a head apart."""
    tokens, width = x.shape
    angles = np.outer(np.arange(tokens), 10000.0 ** -(np.arange(0, width, 2) / width))
    first, second = x[:, : width // 2], x[:, width // 2 :]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=1
    )


def hidden_states(w: Weights, ids: Sequence[int]) -> np.ndarray:
    """Behind the last norm, (tokens, hidden)."""
    x = w["model.embed_tokens.weight"][list(ids)]
    layer = {name.removeprefix("model.layers.0."): value for name, value in w.items()}
    normed = _rms_norm(x, layer["input_layernorm.weight"])
    q, k, v = (normed @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    width = HIDDEN // HEADS
    heads = []
    for head in range(HEADS):
        scores = _rotated(q[:, head * width : (head + 1) * width]) @ _rotated(k).T / math.sqrt(width)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(chances / chances.sum(1, keepdims=True) @ v)
    x = x + np.concatenate(heads, axis=1) @ layer["self_attn.o_proj.weight"].T
    normed = _rms_norm(x, layer["post_attention_layernorm.weight"])
    gate, up = (normed @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return _rms_norm(x, w["model.norm.weight"])


def said_of(policy: Weights, prompt: Sequence[int], response: Sequence[int]) -> tuple[list[float], list[float]]:
    """Log-probability and entropy at each token of a response, under the temperature."""
    hidden = hidden_states(policy, [*prompt, *response])[len(prompt) - 1 : -1]
    logits = hidden @ policy["model.embed_tokens.weight"].T / SETTINGS["temperature"]
    chosen = [ppo_reference.log_softmax(row)[token] for row, token in zip(logits, response, strict=True)]
    return chosen, [ppo_reference.entropy(row) for row in logits]


def values_of(value: Weights, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """The value before each token of a response."""
    hidden = hidden_states(value, [*prompt, *response])[len(prompt) - 1 : -1]
    return (hidden @ value["score.weight"][0]).tolist()


# The rollout.


@dataclass
class Judged:
    """What the updates of a rollout are made from, one list a response."""

    prompts: list[list[int]]
    responses: list[list[int]]
    log_probs: Rows
    reference: Rows
    values: Rows
    advantages: Rows
    returns: Rows


def scores_of(responses: Sequence[Sequence[int]]) -> list[float]:
    """The rewards of responses, in which 0 is the end and 1 the letter."""
    return [1 - abs(sum(response) - 2) / 2 for response in responses]


def judged(
    prompts: list[list[int]], responses: list[list[int]], policy: Weights, reference: Weights, value: Weights,
    scores_before: list[float], kl_coef: float,
) -> Judged:  # fmt: skip
    """Advantages and returns of a rollout. `scores_before`: of all rollouts before it."""
    s, pairs = SETTINGS, list(zip(prompts, responses, strict=True))
    log_probs, others = ([said_of(w, *pair)[0] for pair in pairs] for w in (policy, reference))
    values = [values_of(value, *pair) for pair in pairs]
    scores = scores_of(responses)
    mean, deviation = ppo_reference.mean_and_deviation([*scores_before, *scores])
    rewards = []
    for score, response, new, old in zip(scores, responses, log_probs, others, strict=True):
        score = min(max((score - mean) / (deviation + 1e-8), -s["reward_clip"]), s["reward_clip"])
        score -= 0.0 if response[-1] == 0 else s["missing_eos_penalty"]
        score -= s["length_penalty"] * max(len(response) - s["length_target"], 0)
        kl = [ppo_reference.kl_estimate(a, b, s["kl_estimator"]) for a, b in zip(new, old, strict=True)]
        rewards.append(ppo_reference.token_rewards(score, kl, kl_coef))
    rewards = ppo_reference.whitened(rewards, shift_mean=False)
    advantages = [ppo_reference.advantages(r, v, s["gamma"], s["lam"]) for r, v in zip(rewards, values, strict=True)]
    returns = [[a + b for a, b in zip(*row, strict=True)] for row in zip(advantages, values, strict=True)]
    return Judged(prompts, responses, log_probs, others, values, ppo_reference.whitened(advantages, True), returns)


# The step.


def losses(policy: Weights, value: Weights, of: Judged, rows: Sequence[int]) -> dict[str, float]:
    """Means over the tokens of the mini-batch, and what they come to together, under the names of the log."""
    found = {**_of_policy(policy, of, rows), **_of_value(value, of, rows)}
    return {**found, "loss": _whole(found)}


def _whole(found: dict[str, float]) -> float:
    policy = found.get("loss/policy_avg", 0.0) - SETTINGS["entropy_coef"] * found.get("policy/entropy_avg", 0.0)
    return policy + SETTINGS["vf_coef"] * found.get("loss/value_avg", 0.0)


def _of_policy(policy: Weights, of: Judged, rows: Sequence[int]) -> dict[str, float]:
    cliprange, tokens = SETTINGS["cliprange"], []
    for row in rows:
        log_probs, entropies = said_of(policy, of.prompts[row], of.responses[row])
        for new, old, advantage, entropy in zip(
            log_probs, of.log_probs[row], of.advantages[row], entropies, strict=True
        ):
            loss = ppo_reference.policy_loss(new, old, advantage, cliprange)
            clipped = ppo_reference.policy_slope(new, old, advantage, cliprange) == 0
            moved = ppo_reference.kl_estimate(new, old, "k2")
            tokens.append((loss, entropy, moved, math.exp(new - old), float(clipped)))
    names = ("loss/policy_avg", "policy/entropy_avg", "policy/approxkl_avg", "val/ratio", "policy/clipfrac_avg")
    return {name: sum(column) / len(tokens) for name, column in zip(names, zip(*tokens, strict=True), strict=True)}


def _of_value(value: Weights, of: Judged, rows: Sequence[int]) -> dict[str, float]:
    tokens = [
        ppo_reference.value_loss(new, old, target, SETTINGS["cliprange_value"])
        for row in rows
        for new, old, target in zip(
            values_of(value, of.prompts[row], of.responses[row]), of.values[row], of.returns[row], strict=True
        )
    ]
    return {"loss/value_avg": sum(tokens) / len(tokens)}


def _slopes(of: Callable[[], dict[str, float]], weights: Weights) -> Weights:
    """The derivatives of the loss that `of` computes by each weight, from a difference to either side."""
    found = {}
    for name, weight in weights.items():
        slope = np.zeros_like(weight)
        for at in np.ndindex(weight.shape):
            kept, sides = weight[at], []
            for side in (EPSILON, -EPSILON):
                weight[at] = kept + side
                sides.append(_whole(of()))
            weight[at] = kept
            slope[at] = (sides[0] - sides[1]) / (2 * EPSILON)
        found[name] = slope
    return found


def step(policy: Weights, value: Weights, of: Judged, rows: Sequence[int]) -> tuple[float, Weights, Weights]:
    """The norm of the gradient, and both models behind a step of SGD along the gradient, which is clipped by norm."""
    slopes = [_slopes(lambda: _of_policy(policy, of, rows), policy), _slopes(lambda: _of_value(value, of, rows), value)]
    norm = math.sqrt(sum(float((slope**2).sum()) for one in slopes for slope in one.values()))
    rate = RATE * min(1.0, MOST_NORM / (norm + 1e-6))
    new = [
        {name: weight - rate * one[name] for name, weight in weights.items()}
        for weights, one in zip((policy, value), slopes, strict=True)
    ]
    return norm, new[0], new[1]
