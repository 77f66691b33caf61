"""The cluster as an object: started, asked, damaged and ended by one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType

from launch.slurm.commands import SlurmDown, SlurmRefused, ask, fields
from sft_dist.errors import UserError
from slurm.dev_cluster import files, programs
from slurm.dev_cluster.control import KeeperClient
from slurm.dev_cluster.files import Shape
from slurm.dev_cluster.keeper import CLUSTER_VARIABLE, EVERYTHING, NODE_VARIABLE

_UP_SECONDS = 30.0
_POLL_SECONDS = 0.05
_CREDENTIAL_SECONDS = 2


class DevCluster:
    """A Slurm of `nodes` nodes (n0, n1, ...) of `cpus` processors and `gpus` pretended GPUs each, on this machine.

    Its daemons belong to this process: they and all processes of jobs are gone when it stops the cluster, ends or is
    killed. `cpus` is 4, or one per GPU, unless given. `folder` holds everything and is removed with it; one of its own
    in the temporary folder unless given. Methods raise :class:`UserError` where Slurm refuses or is missing.
    """

    def __init__(
        self, nodes: int = 4, gpus: int = 2, cpus: int | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.shape = Shape(nodes, gpus, cpus or max(4, gpus))
        self.nodes = self.shape.names
        self._given = None if folder is None else Path(folder).absolute()
        self._folder: Path | None = None
        self._keeper: KeeperClient | None = None
        self._programs: dict[str, str] = {}
        self._ports: list[int] = []

    @property
    def folder(self) -> Path:
        """Where everything lies. Raises :class:`RuntimeError` before `start`."""
        if self._folder is None:
            raise RuntimeError("the cluster is not started")
        return self._folder

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the cluster needs in its environment, over that of this process."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def profile(self) -> Path:
        """A profile of this cluster for `sft-dist submit --cluster`."""
        return self.folder / "cluster.yaml"

    def __enter__(self) -> DevCluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until every node is idle. Raises :class:`UserError` with Slurm's last words."""
        if self._keeper is not None:
            raise RuntimeError("the cluster is started already")
        self._programs = programs.find()
        if self._given is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sft-dist-slurm-"))
        else:
            files.refuse_folder(self._given)
            self._folder = self._given
            _make(self._folder)
        try:
            files.refuse_folder(self._folder)
            self._keeper = KeeperClient(self._folder, [EVERYTHING] if self._given is None else files.NAMES)
            self._ports = files.free_ports(1 + self.shape.nodes)
            files.write(self._folder, self.shape, self._ports, programs.version(self._programs["slurmd"]))
            self._start_daemons()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise UserError(f"{self._folder}: {error.strerror or error}; name another --folder") from error
            raise

    def _start_daemons(self) -> None:
        run = self.folder / "run"
        self._start("munged", ["--foreground", "--force", f"--key-file={self.folder / 'munge.key'}",
                               f"--socket={run / 'munge.sock'}", f"--pid-file={run / 'munged.pid'}",
                               f"--log-file={self.folder / 'log' / 'munged.log'}",
                               f"--seed-file={run / 'munge.seed'}"])  # fmt: skip
        self._until((run / "munge.sock").exists, "munged")
        self.start_controller()
        for node in self.nodes:
            self._start_slurmd(node)
        self.wait_for_nodes(_UP_SECONDS)

    def stop(self) -> None:
        """End the cluster: no daemon, no process of a job and no file of it is left. Does nothing twice."""
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
        if self._given is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def wait(self) -> None:
        """Wait until somebody else ends the cluster."""
        self._client().wait()

    def keep(self) -> None:
        """Let the cluster outlive this process; `sft-dist dev-cluster down` ends it."""
        self._client().ask("keep")
        self._client().let_go()
        self._keeper = None

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's daemon; the processes of jobs on it live on."""
        self._client().ask("kill", name=self._known(node))

    def kill_node(self, node: str, noticed: bool = True) -> None:
        """A node whose power fails: its daemon and all processes of jobs on it die at once.

        Slurm finds that after about 17 s, if `srun` in a job's script does not before and the job fails. With `noticed`
        it is told at the same moment: the node is DOWN and drained, its jobs are requeued, all before this returns.
        """
        if noticed:
            # Were it dead first, srun could be quicker. An answer that is still on its way would have the node back.
            self._client().ask("freeze_node", node=self._known(node))
            for state in ("DRAIN", "DOWN"):
                self.run(["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=killed"])
        self._client().ask("kill_node", node=self._known(node))

    def start_slurmd(self, node: str) -> None:
        """Start a node's daemon and wait until it can be reached and Slurm takes the node for alive."""
        self._start_slurmd(self._known(node))
        # Slurm may not have missed it yet.
        port = self._ports[1 + self.nodes.index(node)]
        self._until(lambda: files.is_listened_on(port), node)
        if self.node_states().get(node, "").startswith("dr"):
            self.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
        self.wait_for_nodes(_UP_SECONDS, [node])

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld: Slurm's commands fail until it is started again, jobs run on."""
        self._client().ask("kill", name="slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld, which takes up the jobs that it knew, and wait until it answers."""
        self._start("slurmctld", ["-D"])
        self._until(lambda: self._answers(["scontrol", "ping"]), "slurmctld")

    def run(self, words: Sequence[str], timeout_s: float = 20.0) -> str:
        """What a command of Slurm's prints in this cluster. Raises as `launch.slurm.commands.ask` does."""
        return ask(words, timeout_s, environment=self.environment)

    def job(self, job_id: str | int) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, Reason, Restarts, NodeList ...)."""
        return fields(self.run(["scontrol", "--oneliner", "show", "job", str(job_id)]).strip())

    def wait_for(self, job_id: str | int, states: str | Collection[str], timeout_s: float = 30.0) -> str:
        """Wait until a job is in one of `states` (RUNNING, COMPLETED ...) and return it.

        Raises :class:`TimeoutError` that says how the job stands instead.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout_s
        while (job := self._job_or_nothing(job_id)).get("JobState") not in wanted:
            if time.monotonic() > deadline:
                stands = f"{job.get('JobState')} ({job.get('Reason')}), restarts {job.get('Restarts')}"
                raise TimeoutError(f"job {job_id} is {stands} after {timeout_s:g} s, not {' or '.join(sorted(wanted))}")
            time.sleep(_POLL_SECONDS)
        return job["JobState"]

    def begin_now(self, job_id: str | int) -> None:
        """Let a requeued job start without the two minutes that Slurm puts before it; nothing where it does not wait.

        Not at once: a node refuses the credential of a job that was ended on it in the same second.
        """
        job = self._job_or_nothing(job_id)
        with contextlib.suppress(KeyError, ValueError, SlurmRefused):
            waits = datetime.fromisoformat(job["EligibleTime"]).timestamp() - time.time()
            if job["JobState"] == "PENDING" and waits > 2 * _CREDENTIAL_SECONDS:
                self.run(["scontrol", "update", f"JobId={job_id}", f"StartTime=now+{_CREDENTIAL_SECONDS}"])

    def wait_for_nodes(self, timeout_s: float = _UP_SECONDS, nodes: Collection[str] | None = None) -> None:
        """Wait until nodes (all, unless given) answer and can be used. Raises :class:`UserError` with what they are."""
        wanted = set(self.nodes if nodes is None else nodes)
        usable = {"idle", "mixed", "allocated", "completing"}
        self._until(
            lambda: wanted <= {node for node, state in self.node_states().items() if state in usable},
            f"nodes {', '.join(sorted(wanted))}",
            timeout_s,
        )

    def node_states(self) -> dict[str, str]:
        """The state of each node as `sinfo` has it, with the mark (`*`: does not answer) that it puts behind."""
        try:
            lines = self.run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]).splitlines()
        except SlurmDown:
            return {}
        return dict(line.split() for line in lines if line.strip())

    def _start_slurmd(self, node: str) -> None:
        self._start(node, ["-D", "-N", node])

    def _start(self, name: str, words: Sequence[str]) -> None:
        program = self._programs["slurmd" if name in self.nodes else name]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH_"))}
        environment |= {**self.environment, CLUSTER_VARIABLE: str(self.folder)}
        if name in self.nodes:
            environment[NODE_VARIABLE] = name
        self._client().ask("start", name=name, command=[program, *words], environment=environment)

    def _client(self) -> KeeperClient:
        if self._keeper is None:
            raise RuntimeError("the cluster is not started, or not by this process")
        return self._keeper

    def _known(self, node: str) -> str:
        if node not in self.nodes:
            raise ValueError(f"{node} is none of {', '.join(self.nodes)}")
        return node

    def _answers(self, words: Sequence[str]) -> bool:
        try:
            self.run(words)
        except UserError:
            return False
        return True

    def _job_or_nothing(self, job_id: str | int) -> dict[str, str]:
        try:
            return self.job(job_id)
        except SlurmDown:
            return {}

    def _until(self, done: Callable[[], bool], what: str, timeout_s: float = _UP_SECONDS) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            dead = self._client().missing()
            if dead or time.monotonic() > deadline:
                name = next(iter(dead), "slurmctld")
                said = last_words(self.folder, name)
                raise UserError(f"dev-cluster: {what} did not come up: {name}: {said}")
            time.sleep(_POLL_SECONDS)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"--folder: {folder}: {error.strerror}; name another") from error


def last_words(folder: Path, name: str) -> str:
    """The last complaints of a daemon, or its last lines."""
    try:
        lines = (folder / "log" / f"{name}.err").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    bad = [line.strip() for line in lines if "fatal" in line or "error" in line.lower()]
    # The first cause stands before the last word.
    return "; ".join((bad or [line.strip() for line in lines] or ["it said nothing"])[-3:])
