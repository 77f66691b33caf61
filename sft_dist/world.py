"""How many processes a run has and which one this is."""

from __future__ import annotations

import os
from dataclasses import dataclass

_WORLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class World:
    """How many processes there are and which one this is, from the standard torch.distributed environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        read = {name: int(os.environ.get(name, fallback)) for name, fallback in _WORLD.items()}
        size = read["WORLD_SIZE"]
        return cls(read["RANK"], size, read["LOCAL_RANK"], int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0
