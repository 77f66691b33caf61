"""How full packed rows are, beside TRL's packing of the same lengths, and how long packing takes.

    python -m tests.benchmarks.packing

prints the tables of docs/benchmarks.md in a few minutes; TRL, which packs tokens and not lengths, needs 4 GB for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.packing import fill, lower_bound, pack

Lengths = NDArray[np.int64]

DOCUMENTS = 100_000
CAPACITIES = (2048, 8192)


def uniform(number: int, capacity: int) -> Lengths:
    return np.random.default_rng(0).integers(1, capacity + 1, number)


def log_normal(number: int, capacity: int) -> Lengths:
    """Median 300, as of chats and instructions."""
    return clipped(np.random.default_rng(0).lognormal(np.log(300), 0.8, number), capacity)


def pareto(number: int, capacity: int) -> Lengths:
    """Half are shorter than 188, and the few in a hundred that are longer than the capacity are cut to it."""
    return clipped((1 + np.random.default_rng(0).pareto(1.1, number)) * 100, capacity)


def narrow(number: int, capacity: int) -> Lengths:
    """Nearly all a fifth to a half of the capacity, of which two to four make a row."""
    return clipped(np.random.default_rng(0).lognormal(np.log(0.3 * capacity), 0.2, number), capacity)


def quarter_to_half(number: int, capacity: int) -> Lengths:
    """Two or three to a row; three on average would be too long."""
    return np.random.default_rng(0).integers(capacity // 4 + 1, capacity // 2 + 1, number)


def clipped(lengths: NDArray[np.float64], capacity: int) -> Lengths:
    return np.clip(lengths, 1, capacity).astype(np.int64)


DISTRIBUTIONS: dict[str, Callable[[int, int], Lengths]] = {
    "uniform, 1 to capacity": uniform,
    "log-normal, median 300, sigma 0.8": log_normal,
    "Pareto, from 100, exponent 1.1": pareto,
    "log-normal, median 0.3 capacity, sigma 0.2": narrow,
    "uniform, a quarter to a half of capacity": quarter_to_half,
}


def rows_of_trl(lengths: Lengths, capacity: int) -> int:
    """Rows that TRL makes of such documents with the strategy `bfd`, the whole data set as one batch."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    documents = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.zeros(ends[-1], np.int8)))
    data = Dataset(pa.table({"input_ids": documents}))
    whole = {"batch_size": len(lengths), "writer_batch_size": len(lengths)}
    return len(pack_dataset(data, capacity, strategy="bfd", map_kwargs=whole))


def fill_table() -> None:
    print(f"Share of the rows' tokens that are documents', {DOCUMENTS:,} documents:\n")
    print("| lengths | capacity | rows | fill | fill of TRL's BFD | no fill can be above |\n|---|---|---|---|---|---|")
    for name, draw in DISTRIBUTIONS.items():
        for capacity in CAPACITIES:
            lengths = draw(DOCUMENTS, capacity)
            packs = pack(lengths, capacity, seed=0)
            ours = fill(packs, lengths, capacity)
            theirs = ours * len(packs) / rows_of_trl(lengths, capacity)
            bound = ours * len(packs) / lower_bound(lengths, capacity)
            print(f"| {name} | {capacity} | {len(packs):,} | {ours:.2%} | {theirs:.2%} | {bound:.2%} |", flush=True)


def time_table() -> None:
    millions = (1, 3, 10)
    print("\nSeconds on one core, and the fill of the last:\n")
    print("| lengths | capacity | 1 million | 3 million | 10 million | fill |\n|---|---|---|---|---|---|")
    for name, draw in DISTRIBUTIONS.items():
        for capacity in CAPACITIES:
            seconds = []
            for number in millions:
                lengths = draw(number * 1_000_000, capacity)
                begin = time.perf_counter()
                packs = pack(lengths, capacity, seed=0)
                seconds.append(time.perf_counter() - begin)
            cells = " | ".join(f"{s:.1f}" for s in seconds)
            print(f"| {name} | {capacity} | {cells} | {fill(packs, lengths, capacity):.2%} |", flush=True)


if __name__ == "__main__":
    fill_table()
    time_table()
