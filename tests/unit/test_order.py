"""The order of the rows: by seed and epoch, whole global batches, the same however many processes share them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.order import GlobalOrder


def batches(order: GlobalOrder) -> list[list[int]]:
    rows = list(order)
    return [rows[i : i + order.global_batch_size] for i in range(0, len(rows), order.global_batch_size)]


@given(st.lists(st.integers(1, 999), min_size=1, max_size=60), st.integers(1, 16), st.integers(0, 99))
def test_every_row_comes_once_and_the_rest_is_filler(lengths: list[int], size: int, seed: int) -> None:
    order = GlobalOrder(lengths, size, seed)
    rows = list(order)
    assert len(rows) == len(order) == len(lengths) + order.filler
    assert len(rows) % size == 0
    assert sorted(rows) == [*range(len(lengths)), *[len(lengths)] * order.filler]
    assert rows[len(lengths) :] == [len(lengths)] * order.filler


@given(st.lists(st.integers(1, 999), min_size=1, max_size=60), st.integers(1, 16))
def test_lengths_sort_within_a_global_batch_and_choose_nothing(lengths: list[int], size: int) -> None:
    sorted_batches = batches(GlobalOrder(lengths, size, 7))
    drawn = batches(GlobalOrder([1] * len(lengths), size, 7))
    assert [sorted(batch) for batch in sorted_batches] == [sorted(batch) for batch in drawn]
    for batch in sorted_batches:
        real = [lengths[row] for row in batch if row < len(lengths)]
        assert real == sorted(real, reverse=True)


def test_each_epoch_has_its_own_order_and_a_second_run_the_same() -> None:
    first, again = GlobalOrder(range(50), 4, 1), GlobalOrder(range(50), 4, 1)
    zero = list(first)
    assert zero == list(again)
    first.set_epoch(1)
    assert list(first) != zero
    first.set_epoch(0)
    assert list(first) == zero
    assert list(GlobalOrder(range(50), 4, 2)) != zero
