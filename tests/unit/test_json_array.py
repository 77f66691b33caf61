"""A JSON array is read element by element, as the whole would be."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.json_array import BrokenArray, elements

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
layouts = st.sampled_from([{}, {"indent": 1}, {"indent": 4, "ensure_ascii": False}, {"separators": (",", ":")}])


def read(text: str, chunk: int) -> list[Any]:
    return list(elements(io.StringIO(text), chunk))


@settings(deadline=None)
@given(st.lists(values, max_size=6), layouts, st.integers(1, 40))
def test_elements_are_those_of_the_whole(rows: list[Any], layout: dict[str, Any], chunk: int) -> None:
    assert read(f" \n{json.dumps(rows, **layout)}\n ", chunk) == rows


@settings(deadline=None, max_examples=300)
@given(st.lists(values, min_size=1, max_size=4), layouts, st.integers(0, 2**32), st.integers(1, 200))
def test_a_fault_is_found_where_the_whole_has_it(
    rows: list[Any], layout: dict[str, Any], seed: int, chunk: int
) -> None:
    """A character is taken out, doubled or replaced; line and column are those that `json` tells of the whole text."""
    draw = random.Random(seed)
    text = json.dumps(rows, **layout)
    place = draw.randrange(1, len(text))
    text = text[:place] + draw.choice(["", text[place] * 2, "x", '"', "]", "{", "\n"]) + text[place + 1 :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(BrokenArray) as broken:
            read(text, chunk)
        assert broken.value.line == error.lineno
        assert broken.value.column == error.colno
    else:
        assert read(text, chunk) == expected


def test_memory_holds_a_chunk_and_an_element_only() -> None:
    class Source(io.StringIO):
        longest = 0

        def read(self, size: int | None = -1) -> str:
            assert size is not None
            Source.longest = max(Source.longest, size)
            return super().read(size)

    row = {"text": "x" * 1000}
    source = Source(json.dumps([row] * 500))
    assert sum(1 for _ in elements(source, 256)) == 500
    assert Source.longest < 4096


@pytest.mark.parametrize("text", ["[" * 100_000, f"[{'9' * 5000}]"])
def test_what_the_parser_refuses_is_a_broken_array(text: str) -> None:
    with pytest.raises(BrokenArray):
        read(text, 1 << 20)
