"""What a trainer sums up between two records of its log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Sums:
    """Sums of this rank since the last record, `values`: float64, of any shape.

    `Ordered` keeps them in checkpoints and leaves steps out of them that have changed no weight.
    """

    key = "sums"
    """What a checkpoint calls them."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.values = torch.zeros(*shape, dtype=torch.float64, device=device)
        self._before = self.values

    def begin_step(self) -> None:
        """Remember what was summed before a step."""
        self._before = self.values.clone()

    def of_step(self) -> torch.Tensor:
        """What the step has added so far."""
        return self.values - self._before

    def leave_out_step(self) -> None:
        """Forget what the step has added."""
        self.values.copy_(self._before)

    def take(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        """The sums over all ranks, which begin anew.

        `over_ranks` sums a tensor over all ranks, which call this together.
        """
        total: list[Any] = over_ranks(self.values).tolist()
        self.values = torch.zeros_like(self.values)
        return total

    def state(self) -> Any:
        """What a checkpoint keeps of this rank, as JSON."""
        return self.values.tolist()

    def load_state(self, every: Sequence[Any], takes_sums: bool) -> None:
        """Go on from what a checkpoint kept of this rank, or of all, whose sums one rank takes."""
        total = torch.tensor(every, dtype=torch.float64).sum(0)
        self.values = total.to(self.values.device) * takes_sums
