"""Workers of the tests as the ranks of a strategy, each telling what it saw in a file of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from launch import local
from launch.environment import worker_environments
from launch.processes import Rank, run_ranks
from tests.recipes import ROOT, environment


def told(folder: Path, strategy: str, processes: int, *command: str, **variables: str) -> list[dict[str, Any]]:
    """Run a command once a rank, and read `folder`/told<RANK>.json of each."""
    base = {**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), **variables}
    environments = worker_environments(strategy, processes, master_port=local.free_port(), omp_num_threads=1, base=base)
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    words = [sys.executable, *command]
    code = run_ranks([Rank(rank, words, one, logs[rank]) for rank, one in enumerate(environments)])
    assert code == 0, logs[0].read_text()[-3000:]
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(processes)]
