"""A recipe on this machine: how many processes, with which strategy, and starting them."""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import sft_dist.errors
from launch import devices, fit
from launch.environment import worker_environments
from launch.processes import Ending, Rank, run_to_end
from sft_dist.backend import NODE_SHARDS
from sft_dist.config import Recipe
from sft_dist.errors import UserError

_MARGIN_SECONDS = 10.0
_TELEMETRY_OFF = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def run(recipe_file: Path, recipe: Recipe, *, quiet: bool = False) -> Ending:
    """Train by a resolved recipe in as many processes as it asks for.

    Rank 0 has the terminal, the others (`quiet`: all) write to `<output_dir>/logs/rank<N>.log`. Call it from the main
    thread.
    Raises :class:`UserError` when the machine has not what the recipe asks for.
    """
    found = devices.gpus()
    processes = choose_processes(recipe, found)
    environments = worker_environments(
        choose_strategy(recipe, processes, found),
        processes,
        master_port=free_port(),
        omp_num_threads=_omp_num_threads(processes, bool(found), os.environ),
        base=base_environment(os.environ),
    )
    # As accelerate starts them: unbuffered, so that a log is whole up to the moment its process is killed.
    command = [sys.executable, "-u", "-m", "sft_dist", str(recipe_file)]
    logs = Path(recipe.output.output_dir) / "logs"
    return run_to_end(
        [
            Rank(rank, command, environment, logs / f"rank{rank}.log" if rank or quiet else None)
            for rank, environment in enumerate(environments)
        ],
        # They end by themselves when the grace is over.
        grace_seconds=recipe.checkpoint.grace + _MARGIN_SECONDS,
        stop_signals=[signal.Signals[name] for name in recipe.checkpoint.signals],
    )


def run_module(name: str, words: Sequence[str]) -> int:
    """Run a module of the training plane in one process that has this terminal; returns its exit code."""
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        # The terminal sends Ctrl-C to the child as well, and the child knows best what it means.
        if child is not None and number != signal.SIGINT:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers if _is_heard(number)}
    try:
        child = subprocess.Popen([sys.executable, "-m", name, *words], env=base_environment(os.environ))
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _is_heard(number: signal.Signals) -> bool:
    return signal.getsignal(number) not in (signal.SIG_IGN, None)


def choose_processes(recipe: Recipe, gpus: Sequence[devices.Gpu]) -> int:
    """Processes on this machine: the recipe's number, or one per GPU, or one.

    Without a GPU any number will do. Raises :class:`UserError` for more processes than GPUs.
    """
    wanted = recipe.parallel.processes
    if wanted is None:
        return 1 if recipe.parallel.strategy == "single" else max(1, len(gpus))
    if gpus and wanted > len(gpus):
        have = "1 GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        raise UserError(
            f"parallel.processes: {wanted} is more than the {have} that can be seen here; lower it, or leave it out"
        )
    return wanted


def choose_strategy(recipe: Recipe, processes: int, gpus: Sequence[devices.Gpu], nodes: int = 1) -> str:
    """The strategy on `nodes` of so many `processes` and `gpus` each, with `auto` resolved (see :mod:`launch.fit`).

    Raises :class:`UserError`.
    """
    strategy, world = recipe.parallel.strategy, processes * nodes
    if strategy == "auto":
        return "single" if world == 1 else fit.strategy_for(recipe, world, gpus)
    if strategy == "single" and world > 1:
        have = f"there are {nodes} nodes of {processes}" if nodes > 1 else f"parallel.processes is {processes}"
        raise UserError(f"parallel.strategy: single is one process, {have}; take auto, ddp or zero2")
    if strategy in NODE_SHARDS and processes == 1:
        raise UserError(
            f"parallel.strategy: {strategy} shards over the processes of a node, and there is one; take single, or set "
            "parallel.processes"
        )
    return strategy


def _omp_num_threads(processes: int, on_gpus: bool, environment: Mapping[str, str]) -> int:
    """Threads per process: the user's own number, else a share of the cores, else (on GPUs) accelerate's 1."""
    given = environment.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return 1 if on_gpus else max(1, devices.cpu_cores() // processes)


def free_port() -> int:
    """A port that the kernel picks. It is free until rank 0 binds it, unless somebody takes it in between."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def base_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment every child gets: no telemetry, and this very `sft_dist` to be imported from anywhere."""
    base = dict(environment) | _TELEMETRY_OFF
    folder = str(Path(sft_dist.errors.__file__).resolve().parent.parent)
    paths = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path]
    if folder not in _installed() and folder not in paths:
        base["PYTHONPATH"] = os.pathsep.join([folder, *paths])
    return base


def _installed() -> set[str]:
    """Folders that every interpreter like this one imports from."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    places += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return {str(Path(place).resolve()) for place in places}
