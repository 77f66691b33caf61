"""Workers of the tests as the ranks of a strategy."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from launch import local
from launch.environment import worker_environments
from launch.processes import Rank, run_ranks
from tests.distributed.workers.runs import Group
from tests.recipes import ROOT, environment

_RUNS = ROOT / "tests" / "distributed" / "workers" / "runs.py"


def told(folder: Path, strategy: str, processes: int, *command: str, **variables: str) -> list[dict[str, Any]]:
    """Run a command once a rank, and read `folder`/told<RANK>.json of each."""
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    words = [sys.executable, *command]
    environments = _environments(folder, strategy, processes, variables)
    code = run_ranks([Rank(rank, words, one, logs[rank]) for rank, one in enumerate(environments)])
    assert code == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(processes)]


def do_runs(
    folder: Path, strategy: str, processes: int, jobs: list[list[str]], nodes: Sequence[Path] = ()
) -> list[Path]:
    """Do runs one after another in one group of new processes (see workers/runs.py); the logs of the ranks.

    `nodes`: the folder that each process works in, as on nodes of one process that share no files.
    """
    file = folder / f"{strategy}{processes}-{len(list(folder.glob('*.json')))}.json"
    file.write_text(json.dumps(jobs))
    logs = [file.with_suffix(f".{rank}.log") for rank in range(processes)]
    environments = _environments(folder, strategy, processes, {})
    for rank in range(len(nodes)):
        environments[rank] |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    codes = _done_by_loaded("runs", [str(file)], environments, logs, nodes)
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    return logs


def verify_in_loaded(ranks: Sequence[Rank], **_: float) -> int:
    """In the place of `run_ranks` for `sft-dist verify`, whose workers are new processes all the same."""
    words = list(ranks[0].command)
    logs = [rank.log_path for rank in ranks if rank.log_path is not None]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    environments = [dict(rank.environment) for rank in ranks]
    return max(_done_by_loaded("verify", words[words.index("sft_dist.verify.worker") + 1 :], environments, logs))


def _done_by_loaded(
    work: str, words: list[str], environments: list[dict[str, str]], logs: list[Path], nodes: Sequence[Path] = ()
) -> list[int]:
    """The exit codes of a group of processes."""
    _LOADED.extend(_Loaded() for _ in range(len(environments) - len(_LOADED)))
    for rank, own in enumerate(environments):
        where = str(nodes[rank] if nodes else Path.cwd())
        _LOADED[rank].link.send(
            Group(work=work, words=words, environment=own, working_directory=where, log=str(logs[rank]))
        )
    try:
        return _codes([one.link for one in _LOADED[: len(environments)]])
    except BaseException:
        _unload()
        raise


def _environments(folder: Path, strategy: str, processes: int, variables: dict[str, str]) -> list[dict[str, str]]:
    base = {**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), **variables}
    return worker_environments(strategy, processes, master_port=local.free_port(), omp_num_threads=1, base=base)


class _Loaded:
    """A process with the libraries loaded, whose children do the runs of one rank."""

    def __init__(self) -> None:
        self.link, its = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(_RUNS), str(its.fileno())],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            pass_fds=[its.fileno()],
        )
        its.close()


# By rank, for the whole session; each has its own seed of hashes, as processes that are started have.
_LOADED: list[_Loaded] = []


def _codes(links: Sequence[Connection]) -> list[int]:
    """The exit codes of a group. Those who wait for one that has failed are ended with the processes they came from."""
    codes: dict[Connection, int] = {}
    while len(codes) < len(links):
        ready = wait([link for link in links if link not in codes], timeout=5 if any(codes.values()) else None)
        codes |= {link: link.recv() for link in ready if isinstance(link, Connection)}
        if not ready:
            _unload()
            break
    return list(codes.values())


@atexit.register
def _unload() -> None:
    """End the processes, and what their children do."""
    while _LOADED:
        one = _LOADED.pop()
        one.link.close()
        one.process.wait()


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
