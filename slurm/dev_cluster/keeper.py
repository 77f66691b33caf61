"""What owns the daemons of a cluster, so that none is left. Run as a script, by an isolated interpreter.

`keeper.py OWNER FOLDER [NAME...]` reads requests from its standard input, a line of JSON each, and answers each with
a line of JSON. It ends when it is told to (SIGTERM), when the process OWNER dies, however it dies, or when the other
end of its input closes, unless `keep` was asked for. At its end it kills all its descendants and removes the things
called NAME from FOLDER, or all of it for the NAME `*`. Daemons run in the foreground, as its children; what they leave
to themselves (slurmd does with the processes of jobs) comes to it as well, for it has asked the kernel to be the parent
of orphans.

FOLDER/run/daemons.json has the process of each daemon, null for one that has died; FOLDER/keeper.lock is
locked while the keeper lives. Needs Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

# Marks daemons, so that those of a keeper that was killed itself can be found; slurmstepd inherits it.
CLUSTER_VARIABLE = "SFT_DIST_DEV_CLUSTER"
NODE_VARIABLE = "SFT_DIST_DEV_NODE"
# As a NAME: the whole folder.
EVERYTHING = "*"
# Slurm's own, in the processes of jobs.
_TASK_VARIABLE = "SLURMD_NODENAME"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# A process in the middle of a call to a disk or a file server dies when that has ended.
_PATIENCE_SECONDS = 10.0
_LIBC = ctypes.CDLL(None, use_errno=True)


class Keeper:
    """The daemons by name, and what can be asked for."""

    def __init__(self, owner: int, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._known: dict[str, None] = {}
        self._owner: int | None = None
        self._input: int | None = 0
        with contextlib.suppress(OSError, AttributeError):
            self._owner = os.pidfd_open(owner)
        self._wake, write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def serve(self) -> None:
        """Do what is asked for until it is time to end."""
        pending = b""
        while True:
            sources = [source for source in (self._wake, self._owner, self._input) if source is not None]
            ready, _, _ = select.select(sources, [], [])
            if self._owner in ready:
                return
            if self._wake in ready and signal.SIGTERM in os.read(self._wake, 4096):
                return
            self._reap()
            if self._input in ready:
                assert self._input is not None
                read = os.read(self._input, 65536)
                if not read:
                    return
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    self._answer(json.loads(line))

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = {"answer": getattr(self, f"_do_{request.pop('do')}")(**request)}
        except OSError as error:
            answer = {"error": error.strerror or str(error)}
        # The owner may be gone by now; that is found out elsewhere.
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(answer).encode() + b"\n")

    def _do_start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
        if name in self._daemons:
            return self._daemons[name].pid
        said = os.open(self._folder / "log" / f"{name}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            daemon = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                # There is one thread here, so nothing holds a lock between fork and exec.
                preexec_fn=_die_with_parent,
            )
        finally:
            os.close(said)
        self._daemons[name] = daemon
        self._known[name] = None
        self._record()
        return daemon.pid

    def _do_kill(self, name: str) -> bool:
        """Kill one daemon; whether it was alive."""
        daemon = self._daemons.get(name)
        if daemon is None:
            return False
        daemon.kill()
        os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)
        self._reap()
        return True

    def _do_kill_node(self, node: str) -> int:
        """Kill a node's daemon and all processes of jobs on it, as when its power fails; how many there were."""
        killed = kill_all(lambda: self._of_node(node), self._reap)
        self._reap()
        return killed

    def _do_freeze_node(self, node: str) -> None:
        """Stop them instead; nobody notices yet."""
        for _ in range(2):
            # What was started in the first round is found in the second.
            for pid in self._of_node(node):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)

    def _of_node(self, node: str) -> set[int]:
        return marked(descendants({os.getpid()}), (f"{NODE_VARIABLE}={node}", f"{_TASK_VARIABLE}={node}"))

    def _do_keep(self) -> None:
        """Live on without an owner."""
        self._owner = self._input = None

    def _reap(self) -> None:
        """Bury the dead, and put on record which daemons are alive."""
        names = {daemon.pid: name for name, daemon in self._daemons.items()}
        ended = False
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if dead.si_pid in names:
                    self._daemons.pop(names.pop(dead.si_pid)).wait()
                    ended = True
                else:
                    # An orphan, of which subprocess knows nothing.
                    os.waitpid(dead.si_pid, 0)
        if ended:
            self._record()

    def _record(self) -> None:
        alive = self._known | {name: daemon.pid for name, daemon in self._daemons.items()}
        new = self._folder / "run" / "daemons.json.new"
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(alive))
            new.rename(new.with_suffix(""))

    def end(self) -> None:
        """Kill all descendants, then remove what the cluster has written."""
        kill_all(lambda: descendants({os.getpid()}), self._reap)
        if EVERYTHING in self._names:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for name in self._names:
            path = self._folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        # Where there is something of somebody else's in it, it stays.
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants(roots: Collection[int]) -> set[int]:
    """All processes that descend from `roots`, without them and without the dead that wait to be buried."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name of the command, in parentheses, may hold anything.
                state, parent = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(entry))
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        new = [child for child in children.get(waiting.pop(), []) if child not in found]
        found.update(new)
        waiting += new
    return found


def marked(processes: Collection[int], marks: Collection[str]) -> set[int]:
    """Those of `processes` with one of the `marks` (NAME=VALUE) in their environment, and their descendants."""
    found = {pid for pid in processes if set(marks) & _environment(pid)}
    return found | descendants(found)


def strays(folder: Path) -> set[int]:
    """Processes of the cluster in `folder`, found by their environment: what is left where a keeper was killed."""
    everybody = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - {os.getpid()}
    daemons = marked(everybody, [f"{CLUSTER_VARIABLE}={folder}"])
    configuration = f"SLURM_CONF={folder / 'slurm.conf'}"
    # A shell may have SLURM_CONF, too, and is not to be killed; a process of a job has its node's name besides.
    tasks = {
        pid
        for pid in everybody
        if configuration in (found := _environment(pid))
        and any(word.startswith(f"{_TASK_VARIABLE}=") for word in found)
    }
    return (daemons | tasks | descendants(tasks)) - {os.getpid()}


def _environment(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    except OSError:
        return set()


def kill_all(which: Any, reap: Any = lambda: None) -> int:
    """Kill the processes that `which()` names until it names none; how many were killed."""
    killed: set[int] = set()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (alive := which()) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        killed |= alive
        time.sleep(0.005)
        reap()
    return len(killed)


def main(owner: int, folder: Path, names: Sequence[str]) -> int:
    lock = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.write(1, b'{"error": "taken"}\n')
        return 1
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = Keeper(owner, folder, names)
    try:
        # It may have died before it was watched.
        if os.getppid() == owner:
            os.write(1, b'{"answer": "ready"}\n')
            keeper.serve()
    finally:
        keeper.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
