"""Commands on the cluster of the tests that queue several runs, and waiting for what becomes of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from slurm.dev_cluster import DevCluster
from tests.recipes import environment

LIMIT = 150.0


def command(cluster: DevCluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=folder,
        env={**environment(folder), **cluster.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def until(condition: Callable[[], bool], said: Callable[[], str]) -> None:
    """Wait for something; else what was said meanwhile."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


def write_profile(folder: Path, **more: object) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(
        yaml.safe_dump({"partition": "main", "gpus_per_node": 1, "tasks_per_node": 1, "time": "0:10:00"} | more)
    )
    return file


def logs(folder: Path) -> str:
    """The last lines of all jobs and ranks below a folder."""
    files = sorted([*folder.rglob("*.out"), *folder.rglob("rank*.log")])
    return "\n".join(f"--- {file.relative_to(folder)}\n{file.read_text()[-1500:]}" for file in files)
