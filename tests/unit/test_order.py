"""The order of the rows: by seed and epoch, whole global batches, the same however many processes share them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.arrangement import Arrangement
from sft_dist.data.order import FILLER, GlobalOrder

LENGTHS = st.lists(st.integers(1, 99), min_size=1, max_size=60)


def order_of(lengths: list[int], size: int, seed: int = 7, capacity: int | None = None) -> GlobalOrder:
    return GlobalOrder(Arrangement(np.array(lengths), capacity, seed), size)


def batches(order: GlobalOrder) -> list[list[tuple[int, ...]]]:
    rows = list(order)
    return [rows[i : i + order.global_batch_size] for i in range(0, len(rows), order.global_batch_size)]


@given(LENGTHS, st.integers(1, 16), st.integers(0, 99), st.sampled_from([None, 99, 300]))
def test_every_document_comes_once_and_the_rest_is_filler(
    lengths: list[int], size: int, seed: int, capacity: int | None
) -> None:
    order = order_of(lengths, size, seed, capacity)
    for epoch in (0, 3):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order)
        assert len(rows) % size == 0
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
        assert [row == FILLER for row in rows] == [False] * (len(rows) - order.filler) + [True] * order.filler


@given(LENGTHS, st.integers(1, 16), st.sampled_from([None, 120]))
def test_rows_are_sorted_by_length_within_a_global_batch(lengths: list[int], size: int, capacity: int | None) -> None:
    for batch in batches(order_of(lengths, size, 7, capacity)):
        real = [sum(lengths[document] for document in row) for row in batch if row]
        assert real == sorted(real, reverse=True)


@given(LENGTHS, st.integers(1, 16))
def test_lengths_choose_nothing_where_rows_are_not_packed(lengths: list[int], size: int) -> None:
    drawn = batches(order_of([1] * len(lengths), size))
    assert [sorted(batch) for batch in batches(order_of(lengths, size))] == [sorted(batch) for batch in drawn]


def test_each_epoch_has_its_own_order_and_a_second_run_the_same() -> None:
    for capacity in (None, 64):
        first, again = order_of([*range(1, 51)], 4, 1, capacity), order_of([*range(1, 51)], 4, 1, capacity)
        zero = list(first)
        assert zero == list(again)
        first.set_epoch(1)
        assert list(first) != zero
        first.set_epoch(0)
        assert list(first) == zero
        assert list(order_of([*range(1, 51)], 4, 2, capacity)) != zero
