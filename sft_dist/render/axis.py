"""Axes of pictures, with ticks at round values."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a line of a picture, from `start` to `end` in its units."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    step: float

    @classmethod
    def over(
        cls, low: float, high: float, start: float, end: float, count: int, whole: bool = False, rounded: bool = False
    ) -> Axis:
        """An axis from `low` to `high`; `whole` ticks are integers, a `rounded` axis begins and ends at a tick."""
        if high - low < 1e-12 * max(abs(low), abs(high), 1.0):
            low, high = low - 0.5, high + 0.5
        step = nice((high - low) / count)
        step = max(step, 1.0) if whole else step
        if rounded:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, start, end, tuple(i * step for i in range(first, last + 1)), step)

    def at(self, value: float) -> float:
        """The place of a value in the picture."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick's value with as many digits as tell it from its neighbours."""
        if self.step < 1e-4 or self.high >= 1e6:
            return f"{tick:.3g}"
        return f"{tick:,.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"


@dataclass(frozen=True)
class LogAxis(Axis):
    """An axis on which equal factors are equally far apart. All values are above 0."""

    @classmethod
    def over_factors(cls, low: float, high: float, start: float, end: float) -> LogAxis:
        """An axis from `low` to `high`: ticks at 1, 2 and 5 times the powers of ten, at these alone over many."""
        if high / low < 1 + 1e-9:
            low, high = low / 2, high * 2
        first, last = math.floor(math.log10(low) - 1e-9), math.ceil(math.log10(high) + 1e-9)
        every = max(1, round((last - first) / 6))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        held = tuple(tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9))
        return cls(low, high, start, end, held or (low, high), 0.0)

    def at(self, value: float) -> float:
        """The place of a value in the picture."""
        return self.start + math.log(value / self.low) / math.log(self.high / self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick's value, with thousands or as a power of ten."""
        return f"{tick:,.0f}" if 1 <= tick < 1e6 and tick == int(tick) else f"{tick:g}"


def nice(raw: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
