"""Speaking with the keeper of a cluster: the process that started it, and any other that finds its folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_dist.errors import UserError
from slurm.dev_cluster import keeper

_ANSWER_SECONDS = 30.0
_END_SECONDS = 15.0


class KeeperClient:
    """The keeper that this process started. Raises :class:`UserError` where another holds the folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._started: set[str] = set()
        end_strays(folder)
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self._pending = b""
        try:
            self._read()
        except UserError:
            self.stop()
            raise

    def ask(self, what: str, **words: Any) -> Any:
        """Have the keeper do something and return its answer. Raises :class:`UserError` where it cannot."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"do": what, **words}).encode() + b"\n")
            self._popen.stdin.flush()
        except OSError as error:
            raise UserError(f"{self._folder}: the cluster has been ended by somebody else; start it again") from error
        if what == "start":
            self._started.add(words["name"])
        elif what in ("kill", "kill_node"):
            self._started.discard(words.get("name") or words["node"])
        return self._read()

    def _read(self) -> Any:
        assert self._popen.stdout is not None
        deadline = time.monotonic() + _ANSWER_SECONDS
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            read = os.read(self._popen.stdout.fileno(), 65536) if ready else b""
            if not read:
                raise UserError(f"{self._folder}: the keeper of the cluster has died; start it again")
            self._pending += read
        line, self._pending = self._pending.split(b"\n", 1)
        answer = json.loads(line)
        if answer.get("error") == "taken":
            raise UserError(f"{self._folder}: a dev-cluster is up there already; `sft-dist dev-cluster down` ends it")
        if "error" in answer:
            raise UserError(f"{self._folder}: {answer['error']}; mend that and start the cluster again")
        return answer["answer"]

    def missing(self) -> list[str]:
        """The daemons that were started and have died by themselves."""
        found = daemons(self._folder)
        return sorted(name for name in self._started if found.get(name) is None)

    def wait(self) -> None:
        """Wait until the keeper ends by itself, or because another process told it to."""
        self._popen.wait()

    def stop(self) -> None:
        """End the keeper and with it the cluster."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        try:
            self._popen.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()
        end_strays(self._folder)

    def let_go(self) -> None:
        """Close both ends; of use after the keeper was asked to live on."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.stdout.close()
        # It is no zombie of ours that anybody has to wait for.
        self._popen.returncode = 0


def holder(folder: Path) -> int | None:
    """The keeper of the cluster in `folder`, None where none is alive."""
    try:
        lock = os.open(folder / "keeper.lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = os.read(lock, 32)
        return int(said) if said.isdigit() else None
    finally:
        os.close(lock)
    return None


def daemons(folder: Path) -> dict[str, int | None]:
    """The daemons of a cluster that were started, with their processes; None for one that has died."""
    try:
        found = json.loads((folder / "run" / "daemons.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): pid for name, pid in found.items()}


def end(folder: Path) -> bool:
    """End the cluster in `folder`, whoever started it; whether there was one. Raises :class:`UserError` if it stays."""
    found = holder(folder)
    if found is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while holder(folder) is not None:
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: its keeper, process {found}, does not end; `kill -9 {found}`, then again")
            time.sleep(0.02)
    return end_strays(folder) > 0 or found is not None


def end_strays(folder: Path) -> int:
    """Kill what is left of a cluster whose keeper was killed; how many processes that were."""
    if sys.platform != "linux" or holder(folder) is not None:
        return 0
    return keeper.kill_all(lambda: keeper.strays(folder))
