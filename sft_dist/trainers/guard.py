"""Steps whose numbers are wrong: found before the weights are changed, judged alike by all ranks."""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sft_dist.checkpoints.zero import is_zero
from sft_dist.config import GuardSection

Action = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class Event:
    """What is wrong with a step: `what` in words, the value, and the median of the losses before, where it counts."""

    what: str
    value: float
    median: float | None
    action: Action

    def told(self) -> str:
        """In words, for people."""
        if self.median is None:
            return f"{self.what} is {self.value:g}"
        return f"{self.what} is {self.value:.4g}, {self.value / self.median:.3g} times the median of {self.median:.4g}"


class Gate:
    """Closed, it keeps an optimizer from stepping; the rest of a step goes on as ever.

    Of DeepSpeed's optimizers it is the inner one that is kept: they step in the backward pass, where nobody can come
    between. Their norm of the gradients is looked at, for nobody else has it by then.
    """

    def __init__(self, optimizer: Any) -> None:
        self.closed = False
        inner = getattr(optimizer, "optimizer", optimizer)
        self._zero = inner if is_zero(inner) else None
        base: torch.optim.Optimizer = inner.optimizer if self._zero is not None else inner
        step = base.step

        @functools.wraps(step)
        def gated(*args: Any, **kwargs: Any) -> Any:
            if self.closed or not self._norm_is_sound():
                # By this mark a schedule of torch knows that it is called behind the optimizer; else it warns.
                base._opt_called = True  # type: ignore[attr-defined]
                return None
            return step(*args, **kwargs)

        base.step = gated  # type: ignore[method-assign]

    def _norm_is_sound(self) -> bool:
        if self._zero is None:
            return True
        norm = getattr(self._zero, "_global_grad_norm", 0.0)
        # DeepSpeed says -1 for infinity and NaN.
        return norm is None or (math.isfinite(float(norm)) and float(norm) >= 0)

    def settle(self) -> None:
        """Have a step that was kept count as one all the same: the learning rate goes on with the steps."""
        if self._zero is not None and getattr(self._zero, "overflow", False):
            self._zero.overflow = False


class Guard:
    """Judges the numbers of each step. The losses are those of whole steps over all ranks."""

    def __init__(self, settings: GuardSection) -> None:
        self.settings = settings
        self.events = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window)

    def of_loss(self, loss: float) -> Event | None:
        """What is wrong with the loss of a step; a sound one is remembered."""
        if not math.isfinite(loss):
            return Event("the loss", loss, None, self.settings.nonfinite)
        factor = self.settings.spike_factor
        if factor is not None and len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            # Steps without a trained token have a loss of zero, of which nothing is a multiple.
            if median > 0 and loss > factor * median:
                return Event("the loss", loss, median, self.settings.on_spike)
        self._losses.append(loss)
        return None

    def of_norm(self, norm: float) -> Event | None:
        """What is wrong with the norm of the gradients of a step."""
        if math.isfinite(norm) and norm >= 0:
            return None
        return Event("the norm of the gradients", math.inf if norm < 0 else norm, None, self.settings.nonfinite)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"events": self.events, "losses": list(self._losses)}

    def load_state(self, held: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.events = held["events"]
        self._losses.clear()
        self._losses.extend(held["losses"])
