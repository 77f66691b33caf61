"""Rules on settings that cannot stand together: what a rule is, and where all of them are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sft_dist.config import Recipe

# A dotted key and what is wrong with it.
Finding = tuple[str, str]
Rule = Callable[[Recipe], Iterator[Finding]]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*keys: str) -> Callable[[Rule], Rule]:
    """A rule and the keys that it looks at."""

    def add(new: Rule) -> Rule:
        RULES.append((keys, new))
        return new

    return add
