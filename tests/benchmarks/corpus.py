"""A deterministic corpus of conversations of any size, recombined from the built-in data set."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from sft_dist.data import python_docs

# Characters that an answer has at least: drawn for each, so that lengths are uneven.
_ANSWER = (100, 1300)


def conversations(count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Conversations of one to three exchanges, as role/content turns; no two are equal. Some 470 tokens each."""
    pairs = [
        (turns[i]["value"], turns[i + 1]["value"])
        for record in python_docs.build("train")
        for turns in [record["conversations"]]
        for i in range(0, len(turns) - 1, 2)
    ]
    draw = random.Random(seed)
    for number in range(count):
        turns: list[dict[str, str]] = []
        for _ in range(draw.randint(1, 3)):
            question, answer = draw.choice(pairs)
            enough = draw.uniform(*_ANSWER)
            while len(answer) < enough:
                answer += "\n\n" + draw.choice(pairs)[1]
            turns.append({"role": "user", "content": question if turns else f"{question} (no. {number})"})
            turns.append({"role": "assistant", "content": answer})
        yield turns


def short_conversations(count: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of some thirty tokens, no two of them equal."""
    for number in range(count):
        yield [
            {"role": "user", "content": f"What is number {number} plus one?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]


def write(path: Path, records: Iterator[list[dict[str, str]]]) -> Path:
    """Write conversations as JSON lines in chat format."""
    with open(path, "w", encoding="utf-8") as file:
        for turns in records:
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path
