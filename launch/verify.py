"""`sft-dist verify`: a recipe's model in small, trained under every strategy that this machine can run."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launch import devices, local
from launch.environment import STRATEGIES, worker_environments
from launch.processes import Rank, run_ranks
from sft_dist.backend import NODE_SHARDS
from sft_dist.errors import UserError
from sft_dist.verify.cases import ACCUMULATED, CASES, SHAPES, SINGLE, Plan

_CPU_PROCESSES = 2


def verify(
    recipe: Path | None,
    overrides: Sequence[str],
    *,
    strategies: Sequence[str],
    cases: Sequence[str],
    shapes: Sequence[str],
    processes: int | None,
    folder: Path | None,
) -> int:
    """Run all cases and print the table. Returns 0 if all numbers are those of one process, else 1.

    `strategies`, `cases`: of all that there are, in order; empty for all. `folder` keeps the runs. Raises
    :class:`UserError`.
    """
    plan = Plan((recipe.stem,) if recipe is not None else _known(shapes, SHAPES, "--shape"), _cases(cases))
    size = _processes(processes)
    chosen = [one for one in _known(strategies, STRATEGIES, "--strategy") if one != SINGLE and _possible(one, size)]
    with ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-dist-verify-")))
        where.mkdir(parents=True, exist_ok=True)
        plan.write(where)
        code = local.run_module("sft_dist.verify", ["make", str(where), *_words(recipe, overrides)])
        if code:
            return code
        for strategy in (SINGLE, *chosen):
            _run(strategy, where, 1 if strategy == SINGLE else size)
        return local.run_module("sft_dist.verify", ["report", str(where), ACCUMULATED, *chosen])


def _words(recipe: Path | None, overrides: Sequence[str]) -> list[str]:
    return [] if recipe is None else [str(recipe), *overrides]


def _cases(wanted: Sequence[str]) -> tuple[str, ...]:
    names = _known(wanted, [case.name for case in CASES], "--case")
    if "qlora" in names and importlib.util.find_spec("bitsandbytes") is None:
        print("qlora is left out: bitsandbytes is not installed", flush=True)
        names = tuple(name for name in names if name != "qlora")
    # Recomputed activations are compared with kept ones.
    return ("full", *names) if "checkpointing" in names and "full" not in names else names


def _known(wanted: Sequence[str], every: Sequence[str], option: str) -> tuple[str, ...]:
    """Those of `every` that are wanted, all if none is."""
    for name in wanted:
        if name not in every:
            raise UserError(f"{option}: {name} is none of {', '.join(every)}")
    return tuple(name for name in every if not wanted or name in wanted)


def _processes(wanted: int | None) -> int:
    gpus = len(devices.gpus())
    if wanted is not None and gpus and wanted > gpus:
        raise UserError(f"--processes: {wanted} is more than the {gpus} GPUs that can be seen here; lower it")
    return wanted or gpus or _CPU_PROCESSES


def _possible(strategy: str, processes: int) -> bool:
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        print(f"{strategy} is left out: deepspeed is not installed", flush=True)
        return False
    if strategy in NODE_SHARDS and processes == 1:
        print(f"{strategy} is left out: it needs several processes", flush=True)
        return False
    return True


def _run(strategy: str, folder: Path, processes: int) -> None:
    """All cases under one strategy, its output in the folder's logs."""
    began = time.monotonic()
    environments = worker_environments(
        strategy,
        processes,
        master_port=local.free_port(),
        # The same number everywhere: how a product is summed depends on it.
        omp_num_threads=1,
        base=local.base_environment(os.environ),
    )
    if strategy in NODE_SHARDS and processes % 2 == 0 and processes > 2 and not devices.gpus():
        # Two nodes on one machine, so that there is something to shard within.
        environments = [one | {"LOCAL_WORLD_SIZE": str(processes // 2)} for one in environments]
    command = [sys.executable, "-u", "-m", "sft_dist.verify.worker", strategy, str(folder)]
    logs = folder / "logs" / strategy
    code = run_ranks(
        [Rank(rank, command, one, logs / f"rank{rank}.log") for rank, one in enumerate(environments)], grace_seconds=5
    )
    print(
        f"{strategy}: {'done' if code == 0 else f'ended with {code}'} in {time.monotonic() - began:.0f} s", flush=True
    )
