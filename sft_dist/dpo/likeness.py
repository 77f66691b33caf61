"""Whether two models can be compared token by token. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def other_model(policy: Mapping[str, Any], reference: Mapping[str, Any], name: str) -> str | None:
    """What keeps a reference from being compared with the policy `name`, by their configurations, or None."""
    ours, theirs = ([*(config.get("architectures") or [])][:1] for config in (policy, reference))
    kinds = [policy.get("model_type"), reference.get("model_type")]
    if kinds[0] != kinds[1] or (ours and theirs and ours != theirs):
        has, wants = (*theirs, kinds[1])[0], (*ours, kinds[0])[0]
        return f"its architecture is {has}, that of {name} {wants}; name a model of the same one, or leave it out"
    sizes = [_vocabulary(policy), _vocabulary(reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        return (
            f"its vocabulary has {sizes[1]:,} tokens, that of {name} {sizes[0]:,}; name a model of the same one, or "
            "leave it out"
        )
    return None


def other_vocabulary(policy: Mapping[str, int], reference: Mapping[str, int], name: str) -> str | None:
    """The same by the tokens and ids of their tokenizers."""
    if dict(policy) == dict(reference):
        return None
    token = next((t for t, i in sorted(policy.items(), key=lambda one: one[1]) if reference.get(t) != i), None)
    token = token if token is not None else next(t for t in reference if t not in policy)
    return (
        f"its tokenizer has another vocabulary than that of {name} (the first token that differs: {token!r}); name a "
        "model of the same one, or leave it out"
    )


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return int(size) if size is not None else None
