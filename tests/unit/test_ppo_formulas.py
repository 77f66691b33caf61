"""The formulas of PPO: equal to plain arithmetic written from the papers, and what the papers say of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.ppo import formulas
from tests import ppo_reference as reference

TOLERANCE = 1e-6
# What stands where no token is must count nowhere, so it may be anything.
GARBAGE = 1e3
seeds = st.integers(0, 2**32 - 1)
lengths_of = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
shares = st.floats(0, 1)
ESTIMATORS = ("k1", "k2", "k3")

Rows = list[list[float]]


def rows_of(draw: np.random.Generator, lengths: Sequence[int], scale: float = 1.0) -> Rows:
    return [draw.normal(0, scale, length).tolist() for length in lengths]


def padded(rows: Sequence[Sequence[float]], outside: float = GARBAGE) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[outside] * (width - len(row))] for row in rows], dtype=torch.float64)


def mask_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def assert_rows(found: torch.Tensor, expected: Sequence[Sequence[float]], outside: float | None = 0.0) -> None:
    """Equal within the responses, and `outside` of them what is said."""
    assert found.shape == (len(expected), max(map(len, expected)))
    for have, want in zip(found.tolist(), expected, strict=True):
        assert have[: len(want)] == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
        assert outside is None or set(have[len(want) :]) <= {outside}


# Distributions.


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(2, 12))
def test_log_probabilities_and_entropy(seed: int, n: int, t: int, vocabulary: int) -> None:
    draw = np.random.default_rng(seed)
    logits, tokens = draw.normal(0, 3, (n, t, vocabulary)), draw.integers(0, vocabulary, (n, t))
    chosen = [[reference.log_softmax(logits[i, j])[tokens[i, j]] for j in range(t)] for i in range(n)]
    assert_rows(formulas.log_probs_of(torch.tensor(logits), torch.tensor(tokens)), chosen)
    entropies = [[reference.entropy(logits[i, j]) for j in range(t)] for i in range(n)]
    assert_rows(formulas.entropy_of(torch.tensor(logits)), entropies)


def test_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[[0.0] * 8, [50.0] + [0.0] * 7, [5.0, 5.0] + [-60.0] * 6, [300.1] * 8]])
    expected = [math.log(8), 0, math.log(2), math.log(8)]
    assert formulas.entropy_of(logits).tolist()[0] == pytest.approx(expected, abs=TOLERANCE)


def test_logits_of_half_precision_are_summed_in_float32() -> None:
    """In bf16 the sum over a vocabulary of 50,000 would be off by percents."""
    logits = torch.randn(1, 3, 50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor([[0, 7, 49_999]])
    exact = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    found = formulas.log_probs_of(logits, tokens)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 5e-6


# The penalty.


@given(seeds, lengths_of, st.sampled_from(ESTIMATORS))
def test_kl_at_each_token(seed: int, lengths: list[int], estimator: str) -> None:
    draw = np.random.default_rng(seed)
    policy, other = rows_of(draw, lengths), rows_of(draw, lengths)
    expected = [
        [reference.kl_estimate(p, q, estimator) for p, q in zip(ps, qs, strict=True)]
        for ps, qs in zip(policy, other, strict=True)
    ]
    assert_rows(formulas.kl_of_tokens(padded(policy), padded(other), estimator), expected, outside=None)


@given(seeds, st.integers(2, 6))
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(seed: int, vocabulary: int) -> None:
    """The expectation by enumeration: every token of the vocabulary, weighed by the policy that draws it."""
    draw = np.random.default_rng(seed)
    p, q = (torch.tensor(draw.normal(0, 1, vocabulary)).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    expected = {name: float((p.exp() * formulas.kl_of_tokens(p, q, name)).sum()) for name in ESTIMATORS}
    assert expected["k1"] == pytest.approx(exact, abs=1e-12)
    assert expected["k3"] == pytest.approx(exact, abs=1e-12)
    assert formulas.kl_of_tokens(p, q, "k2").min() >= 0
    assert formulas.kl_of_tokens(p, q, "k3").min() >= 0


def test_k2_is_biased_but_good_near_the_reference() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for step, least, most in ((1.0, 0.02, 1.0), (0.01, 0.0, 0.01)):
        q = (p + step * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)).log_softmax(0)
        exact = (p.exp() * (p - q)).sum()
        off = ((p.exp() * formulas.kl_of_tokens(p, q, "k2")).sum() / exact - 1).abs()
        assert least <= off <= most


def test_an_estimator_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        formulas.kl_of_tokens(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


@given(seeds, lengths_of, st.floats(0, 2))
def test_the_score_stands_at_the_last_token_and_the_penalty_at_each(
    seed: int, lengths: list[int], kl_coef: float
) -> None:
    draw = np.random.default_rng(seed)
    kl, scores = rows_of(draw, lengths), draw.normal(0, 2, len(lengths))
    expected = [reference.token_rewards(s, row, kl_coef) for s, row in zip(scores, kl, strict=True)]
    assert_rows(formulas.scored(torch.tensor(scores), padded(kl), mask_of(lengths), kl_coef), expected)


# Advantages.


@given(seeds, lengths_of, shares, shares)
def test_generalised_advantages_and_returns(seed: int, lengths: list[int], gamma: float, lam: float) -> None:
    draw = np.random.default_rng(seed)
    rewards, values = rows_of(draw, lengths), rows_of(draw, lengths)
    advantages, returns = formulas.advantages_of(padded(rewards), padded(values), mask_of(lengths), gamma, lam)
    expected = [reference.advantages(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    assert_rows(advantages, expected)
    assert_rows(returns, [[a + v for a, v in zip(*row, strict=True)] for row in zip(expected, values, strict=True)])


@given(seeds, lengths_of, shares)
def test_with_lambda_one_the_return_is_what_is_still_to_come(seed: int, lengths: list[int], gamma: float) -> None:
    """And the advantage that less the value (Schulman et al. 2016, equation 18)."""
    draw = np.random.default_rng(seed)
    rewards, values = rows_of(draw, lengths), rows_of(draw, lengths)
    _, returns = formulas.advantages_of(padded(rewards), padded(values), mask_of(lengths), gamma, 1.0)
    assert_rows(returns, [reference.discounted(row, gamma) for row in rewards])


@given(seeds, lengths_of, shares)
def test_with_lambda_zero_the_advantage_is_the_error_of_one_step(seed: int, lengths: list[int], gamma: float) -> None:
    """Schulman et al. 2016, equation 17."""
    draw = np.random.default_rng(seed)
    rewards, values = rows_of(draw, lengths), rows_of(draw, lengths)
    advantages, _ = formulas.advantages_of(padded(rewards), padded(values), mask_of(lengths), gamma, 0.0)
    errors = [
        [r + gamma * later - now for r, now, later in zip(row, value, [*value[1:], 0.0][: len(row)], strict=True)]
        for row, value in zip(rewards, values, strict=True)
    ]
    assert_rows(advantages, errors)


def test_advantages_of_constants_have_a_closed_form() -> None:
    """Reward r at each of T tokens and no values: A_t = r (1 - x^(T - t)) / (1 - x) with x = gamma lam."""
    r, gamma, lam, length = 0.7, 0.9, 0.8, 6
    x = gamma * lam
    rewards, mask = torch.full((1, length), r, dtype=torch.float64), torch.ones(1, length, dtype=torch.bool)
    advantages, _ = formulas.advantages_of(rewards, torch.zeros_like(rewards), mask, gamma, lam)
    assert advantages[0].tolist() == pytest.approx([r * (1 - x ** (length - t)) / (1 - x) for t in range(length)])


def test_values_that_are_right_leave_no_advantage() -> None:
    """V_t = gamma^(T - 1 - t) * score is what a score at the end is worth before it."""
    gamma, score, length = 0.9, 3.0, 5
    mask = torch.ones(1, length, dtype=torch.bool)
    values = torch.tensor([[gamma ** (length - 1 - t) * score for t in range(length)]], dtype=torch.float64)
    rewards = formulas.scored(torch.tensor([score], dtype=torch.float64), torch.zeros_like(values), mask, 0.1)
    advantages, returns = formulas.advantages_of(rewards, values, mask, gamma, 0.95)
    assert advantages.abs().max() < 1e-12
    assert returns[0].tolist() == pytest.approx(values[0].tolist())


def test_one_token_and_none() -> None:
    mask = torch.tensor([[True], [False]])
    rewards = formulas.scored(torch.tensor([2.0, 5.0]), torch.tensor([[0.5], [9.0]]), mask, 0.1)
    assert rewards[:, 0].tolist() == pytest.approx([2.0 - 0.05, 0.0])
    advantages, returns = formulas.advantages_of(rewards, torch.tensor([[0.3], [9.0]]), mask, 0.9, 0.9)
    assert advantages[:, 0].tolist() == pytest.approx([1.65, 0.0])
    assert returns[:, 0].tolist() == pytest.approx([1.95, 0.0])


# Whitening and means.


@given(seeds, lengths_of, st.booleans())
def test_whitening(seed: int, lengths: list[int], shift_mean: bool) -> None:
    draw = np.random.default_rng(seed)
    rows = [[5 + 3 * x for x in row] for row in rows_of(draw, lengths)]
    found = formulas.whitened(padded(rows), mask_of(lengths), shift_mean)
    assert_rows(found, reference.whitened(rows, shift_mean))
    if sum(lengths) > 1:
        inside = found[mask_of(lengths)]
        assert inside.mean() == pytest.approx(0 if shift_mean else np.mean([x for row in rows for x in row]), abs=1e-6)
        assert inside.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_what_does_not_vary_is_whitened_to_zero() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert formulas.whitened(torch.full((2, 2), 4.0), mask).tolist() == [[0, 0], [0, 0]]


@given(seeds, lengths_of)
def test_a_mean_is_one_of_tokens_not_of_responses(seed: int, lengths: list[int]) -> None:
    rows = rows_of(np.random.default_rng(seed), lengths)
    expected = np.mean([x for row in rows for x in row])
    assert float(formulas.masked_mean(padded(rows), mask_of(lengths))) == pytest.approx(expected, abs=1e-12)
    assert float(formulas.masked_mean(padded(rows), torch.zeros_like(mask_of(lengths)))) == 0


# Losses.


@given(seeds, st.integers(1, 30), st.floats(0.01, 0.5))
def test_the_clipped_loss_of_the_policy_and_its_gradient(seed: int, tokens: int, cliprange: float) -> None:
    draw = np.random.default_rng(seed)
    log_probs, old, advantages = (draw.normal(0, scale, tokens).tolist() for scale in (0.3, 0.3, 1.0))
    moved = torch.tensor([log_probs], dtype=torch.float64, requires_grad=True)
    losses, clipped = formulas.policy_losses(moved, padded([old]), padded([advantages]), cliprange)
    every = list(zip(log_probs, old, advantages, strict=True))
    assert_rows(losses, [[reference.policy_loss(*each, cliprange) for each in every]])
    losses.sum().backward()
    slopes = [reference.policy_slope(*each, cliprange) for each in every]
    assert moved.grad is not None
    assert_rows(moved.grad, [slopes])
    assert clipped[0].tolist() == [slope == 0 for slope in slopes]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # has gone far enough up
        (1.5, -1.0, 1.5, 1.5),  # is to come back
        (0.5, -1.0, 0.8, 0.0),  # has gone far enough down
        (0.5, 1.0, -0.5, -0.5),  # is to come back
        (1.1, 2.0, -2.2, -2.2),  # within the range
    ],
)
def test_clipping_holds_back_only_what_has_gone_far_enough(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    """Schulman et al. 2017, figure 1."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    losses, clipped = formulas.policy_losses(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    assert losses.item() == pytest.approx(loss)
    losses.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(slope)
    assert clipped.item() is (slope == 0)


def test_before_any_update_the_gradient_is_that_of_policy_gradients() -> None:
    """With ratio one the loss is -A and its derivative by the log-probability -A, whatever the range."""
    log_probs = torch.tensor([[-1.0, -2.0, -0.3]], requires_grad=True)
    advantages = torch.tensor([[0.4, -1.2, 0.0]])
    losses, clipped = formulas.policy_losses(log_probs, log_probs.detach(), advantages, 0.01)
    losses.sum().backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad, -advantages)
    assert torch.equal(losses, -advantages)
    assert not clipped.any()


@given(seeds, st.integers(1, 30), st.none() | st.floats(0.01, 0.5))
def test_the_clipped_loss_of_values(seed: int, tokens: int, cliprange: float | None) -> None:
    draw = np.random.default_rng(seed)
    values, old, returns = (draw.normal(0, 1, tokens).tolist() for _ in range(3))
    moved = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    losses, clipped = formulas.value_losses(moved, padded([old]), padded([returns]), cliprange)
    every = list(zip(values, old, returns, strict=True))
    assert_rows(losses, [[reference.value_loss(*each, cliprange) for each in every]])
    losses.sum().backward()
    assert moved.grad is not None
    plain = [value - target for value, _, target in every]
    assert moved.grad[0].tolist() == pytest.approx(
        [0.0 if held else error for error, held in zip(plain, clipped[0].tolist(), strict=True)]
    )
    if cliprange is None:
        assert not clipped.any()


def test_a_value_that_has_moved_far_towards_its_return_is_left_alone() -> None:
    values = torch.tensor([[1.0, 1.0, -1.0]], requires_grad=True)
    losses, clipped = formulas.value_losses(values, torch.zeros(1, 3), torch.tensor([[2.0, -2.0, 2.0]]), 0.2)
    losses.sum().backward()
    assert clipped.tolist() == [[True, False, False]]
    assert losses[0].tolist() == pytest.approx([1.8**2 / 2, 3.0**2 / 2, 3.0**2 / 2])
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.0, 3.0, -3.0])


@given(seeds, st.integers(1, 20))
def test_the_distance_from_the_policy_of_the_rollout(seed: int, tokens: int) -> None:
    draw = np.random.default_rng(seed)
    new, old = draw.normal(0, 1, tokens).tolist(), draw.normal(0, 1, tokens).tolist()
    expected = [[reference.kl_estimate(a, b, "k2") for a, b in zip(new, old, strict=True)]]
    assert_rows(formulas.approximate_kl(padded([new]), padded([old])), expected)


# What goes from rollout to rollout.


@given(st.floats(0, 100), st.floats(0.1, 50), st.integers(1, 500), st.integers(1, 500))
def test_the_adaptive_weight_moves_towards_the_target_by_a_fifth_at_most(
    kl: float, target: float, episodes: int, horizon: int
) -> None:
    control = formulas.AdaptiveKL(0.1, target, horizon)
    control.update(kl, episodes)
    error = np.clip(kl / target - 1, -0.2, 0.2)
    assert control.coefficient == pytest.approx(0.1 * (1 + error * min(episodes / horizon, 1)))
    assert (control.coefficient > 0.1) is bool(kl > target) or control.coefficient == pytest.approx(0.1)
    assert 0.08 - 1e-12 <= control.coefficient <= 0.12 + 1e-12


def test_the_adaptive_weight_settles_where_the_target_is() -> None:
    """With a KL that falls as its weight rises: 1 / weight."""
    control = formulas.AdaptiveKL(0.01, target=5.0, horizon=1000)
    for _ in range(500):
        control.update(1 / control.coefficient, episodes=100)
    assert control.coefficient == pytest.approx(0.2, rel=1e-3)


def test_a_fixed_weight_stays() -> None:
    control = formulas.AdaptiveKL(0.3, None, 10)
    control.update(1e6, 1000)
    assert control.coefficient == 0.3


@given(seeds, st.lists(st.integers(1, 20), min_size=1, max_size=8), st.floats(-1e3, 1e3))
def test_running_moments_are_those_of_all_scores_at_once(seed: int, sizes: list[int], offset: float) -> None:
    draw = np.random.default_rng(seed)
    moments, seen = formulas.Moments(), []
    for size in sizes:
        scores = draw.normal(offset, 2, size)
        seen += scores.tolist()
        moments.add(torch.tensor(scores))
    mean, deviation = reference.mean_and_deviation(seen)
    assert (moments.count, moments.mean) == (len(seen), pytest.approx(mean, abs=TOLERANCE))
    found = moments.normalised(torch.tensor(seen, dtype=torch.float64))
    if len(seen) > 1:
        assert found.tolist() == pytest.approx([(s - mean) / (deviation + 1e-8) for s in seen], rel=1e-5, abs=1e-5)
    else:
        assert found.tolist() == [0.0]


def test_tokens_beyond_the_target_cost() -> None:
    lengths = torch.tensor([0, 3, 4, 5, 9])
    assert formulas.beyond_target(lengths, 4, 0.25).tolist() == [0, 0, 0, 0.25, 1.25]
    assert formulas.beyond_target(lengths, None, 0.25).tolist() == [0] * 5


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_gradient_of_the_expected_reward(gamma: float) -> None:
    """All of it together: with no clipping and exact returns, the expectation of the loss's gradient is minus that of
    the expected reward, by enumeration of every response of three tokens out of two."""
    logits = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def reward(response: tuple[int, ...]) -> float:
        return 1.0 * sum(response) - 0.5 * response[0]

    def each(of: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
        log_p = logits.log_softmax(0)
        return torch.stack([of(log_p, response) for response in itertools.product((0, 1), repeat=3)]).sum()

    def expected(log_p: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
        return log_p[list(response)].sum().exp() * reward(response)

    def surrogate(log_p: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
        chosen = log_p[list(response)].unsqueeze(0)
        mask = torch.ones(1, 3, dtype=torch.bool)
        score = torch.tensor([reward(response)], dtype=torch.float64)
        rewards = formulas.scored(score, torch.zeros(1, 3, dtype=torch.float64), mask, 0.0)
        values = torch.full((1, 3), 0.7, dtype=torch.float64)
        advantages, _ = formulas.advantages_of(rewards, values, mask, gamma, 1.0)
        # A discount takes reward off early tokens, which is no part of what is compared.
        advantages = advantages if gamma == 1 else (advantages + values) / gamma ** torch.arange(2, -1, -1.0) - values
        losses, _ = formulas.policy_losses(chosen, chosen.detach(), advantages, 10.0)
        return chosen.sum().exp().detach() * losses.sum()

    gradients = [torch.autograd.grad(each(of), logits)[0] for of in (expected, surrogate)]
    assert gradients[0].abs().max() > 0.1
    assert torch.allclose(gradients[0], -gradients[1], atol=1e-12)
