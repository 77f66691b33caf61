"""Equal conversations are found exactly, in the order of the records."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import digests
from sft_dist.data.digests import SIZE, Seen, digest

# Bytes at both ends of the range, and zeros at the end, which numpy's strings do not keep.
keys = st.lists(st.sampled_from([0, 1, 127, 128, 255]), min_size=SIZE, max_size=SIZE).map(bytes)


@given(st.lists(keys | st.binary(min_size=SIZE, max_size=SIZE), max_size=60), st.integers(1, 8))
def test_only_the_first_of_equals_is_new(some: list[bytes], pending: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(digests, "_PENDING", pending)
        seen, known = Seen(), set()
        for key in [*some, *some]:
            assert seen.add(key) == (key not in known)
            known.add(key)


def test_a_digest_takes_its_own_bytes_and_no_more() -> None:
    seen = Seen()
    for number in range(3 * digests._PENDING):
        assert seen.add(digest(str(number)))
    assert not seen._pending
    assert sum(part.nbytes for part in seen._sorted) == 3 * digests._PENDING * SIZE
    assert sum(map(sys.getsizeof, seen._sorted)) < 3 * digests._PENDING * (SIZE + 1)
    assert not seen.add(digest("5"))
