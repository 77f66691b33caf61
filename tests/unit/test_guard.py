"""Steps whose numbers are wrong are found, and change no weight."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config import GuardSection
from sft_dist.trainers.guard import Event, Gate, Guard


def guard(*losses: float, **settings: Any) -> Guard:
    """A guard that has seen losses, all of them sound."""
    found = Guard(GuardSection.model_validate(settings))
    assert [found.of_loss(loss) for loss in losses] == [None] * len(losses)
    return found


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_found(value: float, action: str) -> None:
    event = guard(nonfinite=action).of_loss(value)
    assert event is not None
    assert (event.action, event.median) == (action, None)
    assert event.told() == f"the loss is {value:g}"


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(
    ("norm", "said"),
    [(math.nan, "nan"), (math.inf, "inf"), (-1.0, "inf"), (-math.inf, "inf")],
)
def test_a_norm_that_is_no_number_is_found(norm: float, said: str, action: str) -> None:
    """DeepSpeed says -1 for infinity and NaN."""
    event = guard(nonfinite=action).of_norm(norm)
    assert event is not None and event.action == action
    assert event.told() == f"the norm of the gradients is {said}"


@settings(deadline=None)
@given(st.floats(min_value=0, allow_infinity=False))
def test_a_norm_that_is_a_number_is_sound(norm: float) -> None:
    assert guard().of_norm(norm) is None


def test_a_spike_is_above_the_factor_times_the_median() -> None:
    watched = guard(1, 5, 2, 4, spike_factor=2, spike_window=4, on_spike="rollback")
    assert watched.of_loss(6.0) is None  # 2 times the median of 3
    event = watched.of_loss(9.1)  # of 5, 2, 4, 6: 4.5
    assert event == Event("the loss", 9.1, 4.5, "rollback")
    assert event.told() == "the loss is 9.1, 2.02 times the median of 4.5"
    # A spike moves no median: the same is one again.
    assert watched.of_loss(9.1) == event
    assert watched.of_loss(9.0) is None


def test_no_step_is_a_spike_before_the_window_is_full() -> None:
    watched = guard(1, 1000, 1, spike_factor=1.5, spike_window=4)
    assert watched.of_loss(1e6) is None
    assert watched.of_loss(1e9) is not None


def test_without_a_factor_none_is_a_spike() -> None:
    watched = guard(*[1.0] * 100, 1e30)
    assert watched.of_loss(math.nan) is not None


@pytest.mark.parametrize("median", [0.0, -1.0])
def test_a_median_that_is_not_above_zero_has_no_multiples(median: float) -> None:
    """Batches without a trained token have a loss of zero."""
    watched = guard(median, median, spike_factor=3, spike_window=2)
    assert watched.of_loss(2.0) is None


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), max_size=40),
    st.integers(2, 8),
    st.floats(1, 100, exclude_min=True),
)
def test_the_rule_of_spikes(losses: list[float], window: int, factor: float) -> None:
    watched = Guard(GuardSection(spike_factor=factor, spike_window=window))
    sound: list[float] = []
    for loss in losses:
        before = sound[-window:]
        median = statistics.median(before) if len(before) == window else 0.0
        event = watched.of_loss(loss)
        assert (event is not None) == (median > 0 and loss > factor * median)
        if event is None:
            sound.append(loss)
        else:
            assert (event.value, event.median, event.action) == (loss, median, "skip") and event.told()


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 1e4), max_size=10), st.integers(2, 6))
def test_a_guard_goes_on_from_its_state(before: list[float], after: list[float], window: int) -> None:
    section = GuardSection(spike_factor=2.5, spike_window=window)
    whole, fresh = Guard(section), Guard(section)
    for loss in before:
        whole.of_loss(loss)
    whole.events = len(before)
    fresh.load_state(json.loads(json.dumps(whole.state())))
    assert fresh.events == whole.events and fresh.state() == whole.state()
    assert [fresh.of_loss(loss) for loss in after] == [whole.of_loss(loss) for loss in after]


def test_a_state_of_another_window_keeps_the_latest_losses() -> None:
    held = guard(9, 9, 1, 1, spike_factor=2, spike_window=4).state()
    shorter = guard(spike_factor=2, spike_window=2)
    shorter.load_state(held)
    assert shorter.of_loss(3.0) is not None
    longer = guard(7, spike_factor=2, spike_window=5)
    longer.load_state(held)
    assert longer.state()["losses"] == [9, 9, 1, 1]
    assert longer.of_loss(30.0) is None


def trained(wrapped: bool) -> tuple[torch.nn.Parameter, Any, Any, Gate]:
    """A weight, its optimizer as a trainer has it, the schedule of the learning rate, and the gate, in this order."""
    weight = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 0.5**step)
    optimizer = SimpleNamespace(optimizer=base, step=lambda *a: base.step(*a)) if wrapped else base
    return weight, optimizer, schedule, Gate(optimizer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_closed_gate_keeps_the_weights(wrapped: bool) -> None:
    weight, optimizer, schedule, gate = trained(wrapped)
    weight.grad = torch.ones(3)
    gate.closed = True
    optimizer.step()
    gate.settle()
    schedule.step()
    base = optimizer.optimizer if wrapped else optimizer
    assert torch.equal(weight, torch.ones(3)) and not base.state
    assert schedule.get_last_lr() == [0.05]
    gate.closed = False
    optimizer.step()
    assert (weight < 1).all() and base.state[weight]["step"] == 1


def test_an_open_gate_changes_nothing() -> None:
    weight, optimizer, _, _ = trained(wrapped=False)
    other = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([other], lr=0.1)
    for step in range(3):
        for one, its in ((weight, optimizer), (other, plain)):
            one.grad = torch.tensor([1.0, -2.0, float(step)])
            its.step()
    assert torch.equal(weight, other)
    # A closure gets through, and its loss comes back.
    assert optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize("closed", [False, True])
def test_the_schedule_finds_its_mark_and_does_not_warn(closed: bool) -> None:
    weight, optimizer, schedule, gate = trained(wrapped=False)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")
    weight.grad = torch.ones(3)
    gate.closed = closed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        schedule.step()
        gate.closed = False
        optimizer.step()
        schedule.step()


class Zero:
    """What the gate sees of DeepSpeed's optimizers: the norm, and the overflow that keeps the learning rate back."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.optimizer = base
        self._global_grad_norm: Any = 0.0
        self.overflow = False

    def _link_all_hp_params(self) -> None:
        """By this they are known."""


@pytest.mark.parametrize(
    ("norm", "steps"),
    [(0.0, True), (2.5, True), (torch.tensor(2.5), True), (None, True), (-1.0, False), (math.nan, False),
     (math.inf, False), (torch.tensor(math.nan), False)],
)  # fmt: skip
def test_the_inner_optimizer_of_zero_steps_on_a_sound_norm_only(norm: Any, steps: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    zero = Zero(torch.optim.AdamW([weight], lr=0.1))
    gate = Gate(SimpleNamespace(optimizer=zero))
    weight.grad = torch.ones(3)
    zero._global_grad_norm = norm
    zero.overflow = not steps
    zero.optimizer.step()
    assert torch.equal(weight, torch.ones(3)) is not steps
    gate.settle()
    assert zero.overflow is False
    zero._global_grad_norm, gate.closed, before = 1.0, True, weight.clone()
    zero.optimizer.step()
    assert torch.equal(weight, before)
