"""Packed rows: whole documents, nearly full, no more of them than TRL makes, in an order that chance alone gives."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.packing import Packs, fill, lower_bound, pack
from tests.benchmarks.packing import DISTRIBUTIONS, log_normal, narrow, pareto, rows_of_trl, uniform

seeds = st.integers(0, 2**32)


@st.composite
def documents(draw: st.DrawFn, most: int = 80) -> tuple[list[int], int]:
    """Lengths, few of them distinct at times, and a capacity that holds each."""
    capacity = draw(st.integers(1, 64))
    kinds = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=most))
    return draw(st.lists(st.sampled_from(kinds), max_size=most)), capacity


def same(one: Packs, other: Packs) -> bool:
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.starts, other.starts)


@given(documents(), seeds, st.integers(1, 100))
def test_every_document_is_in_one_row_whole_and_no_row_is_too_long(
    given_documents: tuple[list[int], int], seed: int, buffer: int
) -> None:
    lengths, capacity = given_documents
    packs = pack(lengths, capacity, seed=seed, buffer=buffer)
    rows = [row.tolist() for row in packs]
    assert len(rows) == len(packs)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(1 <= sum(lengths[i] for i in row) <= capacity for row in rows)
    assert packs.rows.dtype == packs.starts.dtype == np.int64
    assert fill(packs, lengths, capacity) == (sum(lengths) / (len(rows) * capacity) if rows else 1.0)


@given(documents(), seeds)
def test_the_same_arguments_give_the_same_rows_whatever_else_was_drawn(
    given_documents: tuple[list[int], int], seed: int
) -> None:
    lengths, capacity = given_documents
    packs = pack(lengths, capacity, seed=seed)
    np.random.seed(len(lengths))
    again = np.array(lengths, np.int32)
    again.setflags(write=False)
    assert same(packs, pack(again, capacity, seed=seed))


@given(documents(), seeds, st.integers(1, 100))
def test_documents_meet_only_within_a_buffer_of_the_drawn_order(
    given_documents: tuple[list[int], int], seed: int, buffer: int
) -> None:
    lengths, capacity = given_documents
    packs = pack(lengths, capacity, seed=seed, buffer=buffer)
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths))
    buffers = -(-len(lengths) // buffer)
    cuts = [number * len(lengths) // buffers for number in range(buffers + 1)] if buffers else [0]
    assert set(cuts) <= set(packs.starts.tolist())
    for begin, end in pairwise(cuts):
        assert end - begin <= buffer
        assert sorted(packs.rows[begin:end]) == sorted(drawn[begin:end])


def test_another_seed_gives_other_company_and_another_order() -> None:
    lengths = log_normal(20_000, 2048)
    one, other = ([row.tolist() for row in pack(lengths, 2048, seed=seed)] for seed in (1, 2))
    kept = {frozenset(row) for row in one} & {frozenset(row) for row in other}
    assert len(kept) < 0.1 * len(one)  # lengths that few documents have leave little choice
    assert sum(a == b for a, b in zip(one, other, strict=False)) < 0.01 * len(one)


@pytest.mark.parametrize("draw", [uniform, log_normal, pareto, narrow])
def test_neither_rows_nor_documents_in_them_come_by_length(draw) -> None:
    lengths = draw(20_000, 2048)
    packs = pack(lengths, 2048, seed=3, buffer=10_000)
    longer = [np.sign(int(lengths[a]) - int(lengths[b])) for row in packs for a, b in pairwise(row)]
    assert abs(np.mean(longer)) < 0.03
    place = np.arange(len(packs))
    longest = [lengths[row].max() for row in packs]
    number = np.diff(packs.starts)
    for measure in (longest, number):
        assert np.std(measure) == 0 or abs(np.corrcoef(place, measure)[0, 1]) < 0.05


@pytest.mark.parametrize("capacity", [2048, 8192])
@pytest.mark.parametrize("draw", [uniform, log_normal, pareto])
def test_rows_are_full_but_for_half_a_percent_of_what_is_possible(draw, capacity: int) -> None:
    lengths = draw(20_000, capacity)
    packs = pack(lengths, capacity, seed=0)
    assert fill(packs, lengths, capacity) > 0.995
    assert len(packs) <= 1.003 * lower_bound(lengths, capacity)


def test_rows_of_two_to_four_documents_are_full_where_best_fit_leaves_a_twentieth() -> None:
    lengths = narrow(20_000, 2048)
    assert fill(pack(lengths, 2048, seed=0), lengths, 2048) > 0.99


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_more_rows_than_trl_makes(name: str) -> None:
    lengths = DISTRIBUTIONS[name](5000, 2048)
    assert len(pack(lengths, 2048, seed=0)) <= rows_of_trl(lengths, 2048)


@settings(max_examples=25, deadline=None)
@given(documents(), seeds)
def test_no_more_rows_than_trl_makes_of_whatever_lengths(given_documents: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = given_documents
    if lengths:
        assert len(pack(lengths, capacity, seed=seed)) <= rows_of_trl(np.array(lengths), capacity)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By trying every row for every document."""

    def place(number: int, rooms: tuple[int, ...]) -> int:
        if number == len(lengths):
            return len(rooms)
        length = lengths[number]
        ways = [place(number + 1, (*rooms, capacity - length))]
        for i in [i for i, room in enumerate(rooms) if room >= length]:
            ways.append(place(number + 1, (*rooms[:i], rooms[i] - length, *rooms[i + 1 :])))
        return min(ways)

    return place(0, ())


@given(documents(most=6))
def test_no_packing_has_fewer_rows_than_the_lower_bound(given_documents: tuple[list[int], int]) -> None:
    lengths, capacity = given_documents
    assert lower_bound(lengths, capacity) <= fewest_rows(lengths, capacity) <= len(pack(lengths, capacity, seed=0))


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, 0),
        ([5], 8, 1),
        ([8], 8, 1),
        ([1] * 9, 1, 9),
        ([8] * 5, 8, 5),
        ([3] * 7, 8, 4),
        ([5] * 7, 8, 7),
        ([1] * 17, 8, 3),
        ([5, 3, 4, 4, 6, 2], 8, 3),
        ([6, 6, 5, 5, 4, 4, 3, 3, 2, 2], 10, 4),
    ],
)
def test_edge_cases_have_the_fewest_rows(lengths: list[int], capacity: int, rows: int) -> None:
    packs = pack(lengths, capacity, seed=0)
    assert len(packs) == rows and packs.starts[0] == 0 and packs.starts[-1] == len(lengths)


def test_a_buffer_of_one_leaves_each_document_alone() -> None:
    packs = pack([1, 2, 3], 8, seed=0, buffer=1)
    assert sorted(row.tolist() for row in packs) == [[0], [1], [2]]


def test_rows_are_indexed_as_those_of_a_list() -> None:
    packs = pack([3, 3, 3], 3, seed=0)
    assert packs[-1].tolist() == packs[2].tolist()
    with pytest.raises(IndexError):
        packs[3]


@pytest.mark.parametrize(("length", "capacity"), [(0, 8), (-1, 8), (9, 8)])
def test_a_length_that_no_row_takes_is_named_by_its_index(length: int, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"document 2 has {length} tokens; a row takes 1 to {capacity}"):
        pack([1, 8, length, length], capacity, seed=0)


def test_what_is_no_list_of_whole_numbers_and_no_number_of_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="one whole number per document"):
        pack([1.5], 8, seed=0)
    with pytest.raises(ValueError, match="one whole number per document"):
        pack([[1]], 8, seed=0)
    with pytest.raises(ValueError, match="capacity is 0"):
        pack([], 0, seed=0)
    with pytest.raises(ValueError, match="buffer is 0"):
        pack([1], 8, seed=0, buffer=0)


def test_packing_needs_no_torch() -> None:
    code = "import sft_dist.data.packing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
