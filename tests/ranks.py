"""Workers of the tests as the ranks of a strategy."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import local
from launch.environment import worker_environments
from launch.processes import Rank, run_ranks
from tests.recipes import ROOT, environment

_RUNS = ROOT / "tests" / "distributed" / "workers" / "runs.py"


def told(folder: Path, strategy: str, processes: int, *command: str, **variables: str) -> list[dict[str, Any]]:
    """Run a command once a rank, and read `folder`/told<RANK>.json of each."""
    _start(folder, strategy, processes, command, [folder / f"{rank}.log" for rank in range(processes)], [], variables)
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(processes)]


def do_runs(
    folder: Path, strategy: str, processes: int, jobs: list[list[str]], nodes: Sequence[Path] = ()
) -> list[Path]:
    """Do runs one after another in one group of processes (see workers/runs.py); the logs of the ranks.

    `nodes`: the folder that each process works in, as on nodes of one process that share no files.
    """
    file = folder / f"{strategy}{processes}-{len(list(folder.glob('*.json')))}.json"
    file.write_text(json.dumps(jobs))
    logs = [file.with_suffix(f".{rank}.log") for rank in range(processes)]
    _start(folder, strategy, processes, ["-u", str(_RUNS), str(file)], logs, nodes, {})
    return logs


def _start(
    folder: Path, strategy: str, processes: int, command: Sequence[str], logs: list[Path], nodes: Sequence[Path],
    variables: dict[str, str],
) -> None:  # fmt: skip
    base = {**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), **variables}
    environments = worker_environments(strategy, processes, master_port=local.free_port(), omp_num_threads=1, base=base)
    for rank, node in enumerate(nodes):
        environments[rank] |= {"NODE_FOLDER": str(node), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    words = [sys.executable, *command]
    code = run_ranks([Rank(rank, words, one, logs[rank]) for rank, one in enumerate(environments)])
    assert code == 0, "\n".join(log.read_text()[-3000:] for log in logs)


def workers_under(launcher: int) -> list[int]:
    """The processes that train, of a launcher on this machine, by rank; one that ends meanwhile is none."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:
        return []
    return [pid for pid in map(int, children) if "sft_dist" in words_of(pid)]


def words_of(pid: int) -> list[str]:
    """The command line of a process, empty of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
