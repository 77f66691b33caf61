"""Which documents make up the rows of each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import arrangement as module
from sft_dist.data.arrangement import Arrangement, DocumentRows, alone, document_lengths, joined, part, row_lengths
from sft_dist.data.packing import Ints, Packs, pack

LENGTHS = st.lists(st.integers(1, 99), min_size=1, max_size=80)


@dataclass(frozen=True)
class Turning:
    """A stand-in for a mixture: the documents of an epoch go on where those before it ended."""

    count: int
    each: int

    def documents(self, epoch: int) -> Ints:
        return np.arange(epoch * self.each, (epoch + 1) * self.each) % self.count


def documents_of(packs: Packs) -> list[list[int]]:
    return [packs[i].tolist() for i in range(len(packs))]


@given(LENGTHS, st.integers(0, 99))
def test_packed_rows_are_the_same_in_each_epoch_in_another_order(lengths: list[int], seed: int) -> None:
    arrangement = Arrangement(np.array(lengths), 99, seed)
    rows = [documents_of(arrangement.rows(epoch)) for epoch in (0, 1)]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(documents_of(pack(lengths, 99, seed=seed)))
    assert len(arrangement) == len(rows[0])


@given(LENGTHS, st.integers(1, 200), st.integers(0, 99))
def test_a_packed_mixture_has_as_many_rows_each_epoch_and_leaves_no_document_out(
    lengths: list[int], each: int, seed: int
) -> None:
    mixture = Turning(len(lengths), each)
    arrangement = Arrangement(np.array(lengths), 99, seed, mixture)
    rows = [arrangement.rows(epoch) for epoch in range(4)]
    assert {len(packs) for packs in rows} == {len(arrangement)}
    assert all((row_lengths(packs, np.array(lengths)) <= 99).all() for packs in rows)
    # Laid end to end, the epochs are the passes laid end to end.
    laid = [document for packs in rows for document in packs.rows.tolist()]
    for number in range(len(laid) // each):
        assert sorted(laid[number * each : (number + 1) * each]) == sorted(mixture.documents(number).tolist())
    assert documents_of(Arrangement(np.array(lengths), 99, seed, mixture).rows(3)) == documents_of(rows[3])


def test_a_mixture_is_packed_buffer_by_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proportions hold within an epoch, and not only over the whole of it."""
    monkeypatch.setattr(module, "MIXTURE_BUFFER", 50)
    arrangement = Arrangement(np.full(1000, 10), 100, 0, Turning(1000, 1000))
    laid = arrangement.rows(0).rows.tolist()
    for start in range(0, 1000, 50):
        assert sorted(laid[start : start + 50]) == list(range(start, start + 50))


def test_unpacked_rows_of_a_mixture_keep_its_order() -> None:
    assert documents_of(Arrangement(np.ones(5, np.int64), None, 0, Turning(5, 3)).rows(1)) == [[3], [4], [0]]


def test_parts_and_joins_are_each_others_opposite() -> None:
    packs = pack([5, 4, 3, 2, 1, 5, 5], 6, seed=1)
    for cut in range(len(packs) + 1):
        assert documents_of(joined([part(packs, 0, cut), part(packs, cut, len(packs))])) == documents_of(packs)
    assert documents_of(joined([alone(np.array([3, 1]))])) == [[3], [1]]


def test_fill_is_that_of_the_rows() -> None:
    assert Arrangement(np.array([5, 5, 5]), 10, 0).fill() == 0.75
    assert Arrangement(np.array([5, 5, 5]), None, 0).fill() == 1.0


def test_rows_of_documents_tell_their_source_and_the_filler_trains_nothing() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[-100, 2], [-100], [-100, 5, 6]], "length": [2, 1, 3]}
    )
    assert document_lengths(rows).tolist() == [2, 1, 3]
    assert document_lengths(rows.select([2, 0])).tolist() == [3, 2]
    found = DocumentRows(rows, 7, filler_token=9, borders=(0, 1))
    assert len(found) == 7
    first, last = found[(0, 2)]
    assert (first["input_ids"].tolist(), first["source"]) == ([1, 2], 0)
    assert (last["labels"].tolist(), last["source"]) == ([-100, 5, 6], 1)
    assert found[()] == [{"input_ids": [9], "labels": [-100], "source": 0}]
    assert set(DocumentRows(rows, 7, filler_token=9)[(0,)][0]) == {"input_ids", "labels"}
