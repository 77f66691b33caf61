"""What the processes of a run agree upon: small things, on process groups of their own, off the GPUs.

A group is used by one thread at a time: the training has one, the thread that writes checkpoints another.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# A rank may be held up for long by its file system; one that hangs is found by the watchdog.
_PATIENCE = timedelta(hours=6)
_GROUPS: dict[tuple[int, str], Any] = {}


class Together:
    """All ranks of a run; each method is called by all of them. `name`: of the thread that uses it."""

    def __init__(self, name: str) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            key = (id(dist.group.WORLD), name)
            if key not in _GROUPS:
                _GROUPS[key] = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self._group = _GROUPS[key]

    def every(self, own: T) -> list[T]:
        """What each rank gives, by rank."""
        if self._group is None:
            return [own]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, own, group=self._group)
        return held

    def most(self, own: Sequence[int]) -> list[int]:
        """The largest of what the ranks give, each place by itself."""
        if self._group is None:
            return list(own)
        held = torch.tensor(list(own), dtype=torch.int64)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in held]

    def total(self, own: Sequence[float]) -> list[float]:
        """The sums of what the ranks give, each place by itself, the same on all ranks."""
        if self._group is None:
            return list(own)
        held = torch.tensor(list(own), dtype=torch.float64)
        dist.all_reduce(held, op=dist.ReduceOp.SUM, group=self._group)
        return [float(value) for value in held]


class Place:
    """Which ranks see the same folder: those of all nodes on a shared file system, else those of a node.

    `leader`: the lowest rank that sees this rank's folder; it does for all of them what is done once a folder.
    `leaders`: of every folder. `index`: this rank's place among the `count` ranks that see the same folder. All ranks
    make it together, and the folder is there.
    """

    def __init__(self, folder: Path, together: Together, local_rank: int) -> None:
        self.rank = together.rank
        token = together.every(uuid.uuid4().hex)[0]
        own = folder / f".seen-{token}-{self.rank}"
        candidates = [rank for rank, local in enumerate(together.every(local_rank)) if local == 0]
        if local_rank == 0:
            own.touch(mode=0o600)
        together.every(None)
        # Looked up by name: a listing may be an old one on NFS.
        self.leader = next((rank for rank in candidates if os.path.exists(folder / f".seen-{token}-{rank}")), self.rank)
        every = together.every(self.leader)
        self.leaders = sorted(set(every))
        beside = [rank for rank, leader in enumerate(every) if leader == self.leader]
        self.index, self.count = beside.index(self.rank), len(beside)
        if local_rank == 0:
            own.unlink(missing_ok=True)
        if self.is_leader:
            # Of starts that were killed here; there is one run in a folder at a time.
            for left in (path for path in folder.glob(".seen-*") if token not in path.name):
                left.unlink(missing_ok=True)

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader
