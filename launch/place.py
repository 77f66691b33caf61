"""Where a run takes place: the machines, what they compute with, and how many processes they run."""

from __future__ import annotations

from dataclasses import dataclass

from launch import devices
from launch.local import choose_processes, choose_strategy
from sft_dist.config import Recipe


@dataclass(frozen=True)
class Place:
    """`gpus` are those of one node, `processes` the number on each of the `nodes`."""

    gpus: list[devices.Gpu]
    processes: int
    nodes: int = 1
    is_here: bool = True

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.processes * self.nodes

    def strategy(self, recipe: Recipe) -> str:
        """The strategy of a recipe, with `auto` resolved. Raises :class:`UserError`."""
        return choose_strategy(recipe, self.processes, self.gpus, self.nodes)


def this_machine(recipe: Recipe) -> Place:
    """Raises :class:`UserError` where the recipe asks for more than there is."""
    gpus = devices.gpus()
    return Place(gpus, choose_processes(recipe, gpus))
