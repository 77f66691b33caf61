"""A look at the machines of a run, by all of its processes: `python -m sft_dist.probe FOLDER SECONDS`.

Each process sees the folder and loads the libraries; together they do one all-reduce; the first process of each node
then measures the all-reduce with that of each other node. Rank 0 writes FOLDER/probe.json.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_dist.errors import UserError
from sft_dist.process import end_process, guarded, leave_process_group, settle_accelerator
from sft_dist.rundir import write_text

_NEEDED = ("transformers", "trl", "accelerate", "datasets", "safetensors")
_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
_ROUNDS = 4


def main(words: Sequence[str]) -> int:
    """Probe as one of the processes that the environment tells of. Returns the exit code."""

    def work() -> None:
        settle_accelerator()
        probe(Path(words[0]), float(words[1]))
        leave_process_group()

    return guarded(work)


def probe(folder: Path, seconds: float) -> None:
    """Look, measure for at most about so many seconds, and write the result. Raises :class:`UserError`."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    about = _look(folder, rank, local)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, about)
    speeds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(speeds, _pairs(device, every, time.monotonic() + seconds))
    if rank == 0:
        pairs = [pair for own in speeds for pair in own]
        write_text(folder / "probe.json", json.dumps({"ranks": every, "pairs": pairs}, indent=2) + "\n")


def _look(folder: Path, rank: int, local: int) -> dict[str, Any]:
    """What this process sees of its machine."""
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    try:
        write_text(folder / f"seen-by-{rank}", node)
    except OSError as error:
        raise UserError(
            f"{node}: {folder} cannot be written from there: {error.strerror}; take a shared folder"
        ) from error
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{node}: {name} cannot be imported there ({error}); mend setup or python of the profile"
            ) from error
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        raise UserError(f"{node}: process {local} of the node has no GPU: it sees {gpus}; mend gpus_per_node")
    return {"rank": rank, "node": node, "group": int(os.environ["GROUP_RANK"]), "gpus": gpus}


def _pairs(device: torch.device, every: Sequence[Any], deadline: float) -> list[dict[str, Any]]:
    """Bytes per second of an all-reduce with the first process of each other node, until the deadline.

    In each round every node is in one pair, so that a slow node shows after the first.
    """
    leaders = [
        min(one["rank"] for one in every if one["group"] == group) for group in sorted({o["group"] for o in every})
    ]
    data = torch.ones(_BYTES[device.type] // 4, device=device)
    # All take part, whether a link between two is to be measured or not.
    dist.all_reduce(data)
    data.fill_(1.0)
    found = []
    for round_ in tournament(len(leaders)):
        for one, other in round_:
            # Every process has to come by, for the groups to be numbered alike.
            group = dist.new_group([leaders[one], leaders[other]])
            if dist.get_rank() in (leaders[one], leaders[other]):
                took = _median_seconds(data, group, device)
                if dist.get_rank() == leaders[one]:
                    nodes = [every[leaders[one]]["node"], every[leaders[other]]["node"]]
                    found.append({"nodes": nodes, "bytes_per_second": data.numel() * 4 / took})
        late = torch.tensor([float(time.monotonic() > deadline)], device=device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late.item():
            break
    return found


def _median_seconds(data: torch.Tensor, group: Any, device: torch.device) -> float:
    took = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    # The first one makes the connection.
    return statistics.median(took[1:])


def tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of `count`, in rounds in which nobody plays twice (the circle method)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(places) - 1):
        halves = zip(places[: len(places) // 2], reversed(places[len(places) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in halves if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
