"""A real Slurm of four nodes on this machine, for all tests of this folder; a test may have one of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from slurm.dev_cluster import DevCluster, missing


def need_slurm() -> None:
    """Skip, aloud, where the packages are not there; `.ci/skipped.py` sees to it that they were meant to be missing."""
    if lacking := missing():
        pytest.skip(f"needs Slurm ({', '.join(lacking)}): apt-get install slurm-wlm munge")


@pytest.fixture(scope="session")
def cluster() -> Iterator[DevCluster]:
    """Four nodes of two GPUs, shared by the session. It is gone when pytest ends, also when pytest is killed."""
    need_slurm()
    with DevCluster(nodes=4, gpus=2) as started:
        yield started


@pytest.fixture
def new_cluster() -> Iterator[Callable[..., DevCluster]]:
    """A function that starts a cluster for one test (the arguments are those of `DevCluster`)."""
    need_slurm()
    with contextlib.ExitStack() as started:
        yield lambda **words: started.enter_context(DevCluster(**words))
