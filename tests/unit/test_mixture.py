"""The plan of a mixture: exact proportions at every prefix, every document equally often, the same on any machine."""

from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data import mixture
from sft_dist.data.mixture import Draws, Mixture, Stop, schedule, shares

WEIGHTS = st.lists(st.floats(0.01, 100) | st.integers(1, 20).map(float), min_size=1, max_size=7)
STOPS: st.SearchStrategy[Stop] = st.sampled_from(["first_exhausted", "all_exhausted"])


def of(weights: list[float]) -> list[float]:
    return shares(weights, [None] * len(weights), 1.0)


def off(turns: np.ndarray, probabilities: list[float]) -> float:
    """How far any source is from its share after any number of documents."""
    after = np.arange(1, len(turns) + 1)
    return max(float(np.abs(np.cumsum(turns == i) - after * p).max()) for i, p in enumerate(probabilities))


def plain_turns(probabilities: list[float], count: int) -> list[int]:
    """Tijdeman's rule as his paper states it, a turn at a time."""
    parts = mixture._parts(probabilities)
    exact = [Fraction(part, parts.whole) for part in parts.parts]
    slack = Fraction(1, parts.slack)
    drawn = [0] * len(exact)
    turns = []
    for n in range(1, count + 1):
        behind = [(n * p - x, i) for i, (p, x) in enumerate(zip(exact, drawn, strict=True))]
        eligible = [i for lag, i in behind if lag >= slack]
        due = {i: (drawn[i] + 1 - slack) / exact[i] for i in eligible}
        chosen = min(eligible, key=lambda i: (due[i].numerator // due[i].denominator, i))
        drawn[chosen] += 1
        turns.append(chosen)
    return turns


def plain_pass(sizes: list[int], probabilities: list[float], stop: Stop) -> list[int]:
    """The turns of a pass by the words of the two strategies."""
    drawn = [0] * len(sizes)
    turns: list[int] = []
    for source in Draws(probabilities):
        if stop == "first_exhausted" and drawn[source] == sizes[source]:
            return turns
        drawn[source] += 1
        turns.append(source)
        if stop == "all_exhausted" and all(x >= size for x, size in zip(drawn, sizes, strict=True)):
            return turns
    raise AssertionError("the draws end")


# Turns


@given(WEIGHTS, st.integers(1, 400))
def test_every_source_keeps_to_its_share_at_every_prefix(weights: list[float], count: int) -> None:
    probabilities = of(weights)
    bound = 1 - 1 / max(2 * len(weights) - 2, 2)
    assert off(schedule(probabilities, count), probabilities) <= bound + 1e-9


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=20, max_size=60))
def test_many_sources_keep_to_their_shares(weights: list[float]) -> None:
    probabilities = of(weights)
    assert off(schedule(probabilities, 20_000), probabilities) < 1


def test_the_source_furthest_behind_would_leave_the_bound_and_the_rule_here_does_not() -> None:
    probabilities = of([39, 39, 39, 39, 1, 1, 1, 1])
    drawn, turns = np.zeros(8), []
    for n in range(1, 161):
        turns.append(int(np.argmax(n * np.array(probabilities) - drawn)))
        drawn[turns[-1]] += 1
    assert off(np.array(turns), probabilities) > 1.1
    assert off(schedule(probabilities, 160), probabilities) < 0.93


@given(WEIGHTS, st.integers(1, 120))
def test_the_turns_are_those_of_the_paper(weights: list[float], count: int) -> None:
    assert schedule(of(weights), count).tolist() == plain_turns(of(weights), count)


@given(WEIGHTS, st.integers(1, 60), st.integers(0, 200))
def test_turns_are_the_same_in_pieces_of_any_length(weights: list[float], piece: int, count: int) -> None:
    whole = schedule(of(weights), count).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "_CHUNK", piece)
        patch.setattr(mixture, "_CHUNK_OF_AN_ITERATOR", piece)
        assert schedule(of(weights), count).tolist() == whole
        assert list(islice(Draws(of(weights)), count)) == whole


@given(WEIGHTS, st.integers(0, 150))
def test_a_saved_iterator_goes_on_where_it_stood(weights: list[float], before: int) -> None:
    draws = Draws(of(weights))
    list(islice(draws, before))
    again = Draws(of(weights), json.loads(json.dumps(draws.state)))
    assert sum(again.state) == before
    assert list(islice(again, 100)) == list(islice(draws, 100))


def test_an_iterator_keeps_to_its_shares_after_a_billion_documents() -> None:
    probabilities = of([7, 2, 1])
    draws = Draws(probabilities, [700_000_000_000, 200_000_000_000, 100_000_000_000])
    assert list(islice(draws, 500)) == list(islice(Draws(probabilities), 500))


def test_a_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="a state of 3 sources for 2 shares"):
        Draws([0.5, 0.5], [1, 2, 3])


def test_a_million_turns_take_about_a_second() -> None:
    start = time.perf_counter()
    assert len(schedule(of([6, 3, 1]), 1_000_000)) == 1_000_000
    assert time.perf_counter() - start < 10


# Shares


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
def test_temperature_one_is_in_proportion_and_a_high_one_makes_all_equal(sizes: list[int]) -> None:
    missing = [None] * len(sizes)
    assert shares(missing, sizes, 1.0) == pytest.approx([size / sum(sizes) for size in sizes])
    assert shares(missing, sizes, 1e9) == pytest.approx([1 / len(sizes)] * len(sizes), rel=1e-6)


@given(WEIGHTS, st.floats(0.2, 20))
def test_shares_are_the_powers_of_the_weights(weights: list[float], temperature: float) -> None:
    found = shares(weights, [None] * len(weights), temperature)
    powers = [weight ** (1 / temperature) for weight in weights]
    assert found == pytest.approx([power / sum(powers) for power in powers])
    assert sum(found) == pytest.approx(1)


def test_a_missing_weight_is_the_number_of_documents() -> None:
    assert shares([None, 30], [10, 5], 1.0) == pytest.approx([0.25, 0.75])
    assert shares([None, None], [16, 1], 2.0) == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("weights", "sizes", "temperature", "said"),
    [
        ([1, None], [None, None], 1.0, "source 1 has neither a weight nor a known size"),
        ([1, 0], [None, None], 1.0, "source 1 has the weight 0; it must be above 0"),
        ([None, 1], [0, 1], 1.0, "source 0 has the weight 0"),
        ([1, float("inf")], [1, 1], 1.0, "source 1 has the weight inf"),
        ([1, 1], [1, 1], 0.0, "temperature is 0.0; it must be above 0"),
        ([1, 2], [1, 1], 1e-4, "source 0 is left without a share at temperature 0.0001; raise it"),
    ],
)
def test_what_is_no_weight_is_refused(
    weights: list[float | None], sizes: list[int | None], temperature: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        shares(weights, sizes, temperature)


# Epochs


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    count = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    weights = draw(st.lists(st.none() | st.floats(0.2, 5), min_size=count, max_size=count))
    stop = draw(STOPS)
    try:
        return Mixture(sizes, shares(weights, sizes, draw(st.sampled_from([1.0, 3.0]))), stop, draw(st.integers(0, 9)))
    except ValueError as error:
        assert "is not drawn once" in str(error) and stop == "first_exhausted"
        return Mixture(sizes, shares(weights, sizes, 1.0), "all_exhausted", 0)


def sources_of(plan: Mixture, documents: np.ndarray) -> list[int]:
    return (np.searchsorted(plan.borders, documents, side="right") - 1).tolist()


@settings(deadline=None)
@given(mixtures())
def test_a_pass_ends_where_its_strategy_says(plan: Mixture) -> None:
    turns = plain_pass(plan.sizes, plan.shares, plan.stopping_strategy)
    assert len(plan) == len(turns)
    for epoch in (0, 1, 7):
        assert sources_of(plan, plan.documents(epoch)) == turns
    assert plan.counts == [turns.count(source) for source in range(len(plan.sizes))]
    if plan.stopping_strategy == "first_exhausted":
        assert all(count <= size for count, size in zip(plan.counts, plan.sizes, strict=True))
    else:
        assert all(count >= size for count, size in zip(plan.counts, plan.sizes, strict=True))


@settings(deadline=None)
@given(mixtures(), st.integers(1, 6))
def test_every_document_of_a_source_comes_equally_often_within_one(plan: Mixture, epochs: int) -> None:
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        seen.update(plan.documents(epoch).tolist())
    assert max(seen) < sum(plan.sizes)
    for source, (border, size) in enumerate(zip(plan.borders, plan.sizes, strict=True)):
        times = [seen[border + document] for document in range(size)]
        assert max(times) - min(times) <= 1
        assert sum(times) / size == pytest.approx(plan.source_epochs(epochs - 1)[source])


@settings(deadline=None)
@given(mixtures(), st.integers(0, 20))
def test_any_epoch_is_known_without_those_before_it(plan: Mixture, epoch: int) -> None:
    again = Mixture(plan.sizes, plan.shares, plan.stopping_strategy, plan.seed)
    for earlier in range(min(epoch, 3)):
        again.documents(earlier)
    assert again.documents(epoch).tolist() == plan.documents(epoch).tolist()


@given(st.integers(1, 100), STOPS, st.integers(0, 5))
def test_one_source_is_a_permutation_of_its_documents(size: int, stop: Stop, epoch: int) -> None:
    plan = Mixture([size], shares([None], [size], 1.0), stop, 3)
    assert sorted(plan.documents(epoch).tolist()) == list(range(size))
    assert plan.source_epochs(epoch) == [epoch + 1]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), STOPS)
def test_sources_in_proportion_to_their_sizes_are_all_their_documents(sizes: list[int], stop: Stop) -> None:
    plan = Mixture(sizes, shares([None] * len(sizes), sizes, 1.0), stop, 0)
    assert sorted(plan.documents(2).tolist()) == list(range(sum(sizes)))


def test_order_depends_on_seed_source_and_round_and_the_turns_on_none_of_them() -> None:
    plan, other = (Mixture([50, 50], [0.5, 0.5], "first_exhausted", seed) for seed in (1, 2))
    first = plan.documents(0)
    assert first.tolist() != other.documents(0).tolist()
    assert first.tolist() != plan.documents(1).tolist()
    assert [d for d in first if d < 50] != [d - 50 for d in first if d >= 50]
    assert plan.turns.tolist() == other.turns.tolist()


def test_what_an_epoch_leaves_out_comes_in_the_next() -> None:
    plan = Mixture([10, 40], [0.5, 0.5], "first_exhausted", 0)
    assert plan.counts == [10, 10]
    large = [d for epoch in range(4) for d in plan.documents(epoch).tolist() if d >= 10]
    assert sorted(large) == list(range(10, 50))
    assert plan.source_epochs(0) == [1, 0.25]
    assert plan.source_epochs(3) == [4, 1]


@pytest.mark.parametrize(
    ("sizes", "weights", "stop", "said"),
    [
        ([5, 0], [1, 1], "all_exhausted", "source 1 has no document"),
        ([1, 9], [99, 1], "first_exhausted", "source 1 is not drawn once before another is exhausted; raise its"),
        ([5, 5], [1e12, 1], "all_exhausted", "an epoch would be .* documents, until source 1 is exhausted; raise its"),
        ([5, 5, 5], [1, 1], "all_exhausted", "3 sizes for 2 shares"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sizes: list[int], weights: list[float], stop: Stop, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(sizes, of(weights), stop, 0)
