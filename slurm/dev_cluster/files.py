"""The files of a cluster on one machine: what Slurm's daemons read, and a profile for `sft-dist submit`."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.errors import UserError

# What a cluster writes into its folder, and what is removed with it. The lock goes last: without it the folder is free.
NAMES = ("slurm.conf", "gres.conf", "cgroup.conf", "cluster.yaml", "munge.key", "state", "spool", "log", "run",
         "gpus", "keeper.lock")  # fmt: skip
# A path of a socket has to fit into 108 bytes.
_LONGEST = 90
# From here on a cluster without cgroups has to say so; before, Slurm touches them only where a plugin asks.
_CGROUPS_CAN_BE_DISABLED = (24, 5)

# What stood in SchedulerParameters, and still may.
_PREEMPTION_HAS_ITS_OWN = (23, 2)


@dataclass(frozen=True)
class Shape:
    """What a cluster consists of: `nodes` of `cpus` and `gpus` each."""

    nodes: int
    gpus: int
    cpus: int

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(self.nodes)]

    def __str__(self) -> str:
        def count(number: int, what: str) -> str:
            return f"{number} {what}{'' if number == 1 else 's'}"

        return f"{count(self.nodes, 'node')} of {count(self.cpus, 'CPU')} and {count(self.gpus, 'GPU')}"


def refuse_folder(folder: Path) -> None:
    """Raise :class:`UserError` where Slurm could not work in `folder`, or would write over what is not a cluster's."""
    if len(os.fsencode(folder)) > _LONGEST:
        raise UserError(
            f"--folder: {folder} is too long for the path of a socket; name one of {_LONGEST} bytes at most"
        )
    if not all(letter.isalnum() or letter in "/._+-" for letter in str(folder)):
        raise UserError(
            f"--folder: {folder} has letters that have a meaning in slurm.conf; name one of letters, digits and . _ + -"
        )
    # A cluster whose keeper was killed has left everything, its lock as well.
    there = [name for name in NAMES if os.path.lexists(folder / name)]
    if there and NAMES[-1] not in there:
        raise UserError(f"--folder: {folder} has {there[0]} already, which is no dev-cluster's; name an empty folder")


def write(folder: Path, shape: Shape, ports: Sequence[int], version: tuple[int, int]) -> None:
    """Write all files of a cluster; `ports` are those of slurmctld and of each node. Raises :class:`OSError`."""
    for name in ("state", "spool", "log", "run", "gpus"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    for number in range(shape.gpus):
        gpu = folder / "gpus" / f"gpu{number}"
        gpu.unlink(missing_ok=True)
        # Where it is no device, Slurm counts the GPUs but does not tell jobs which are theirs.
        gpu.symlink_to("/dev/null")
    texts = {
        "slurm.conf": slurm_conf(folder, shape, ports, version),
        "gres.conf": _gres_conf(folder, shape),
        "cluster.yaml": _profile(shape),
        **({"cgroup.conf": "CgroupPlugin=disabled\n"} if version >= _CGROUPS_CAN_BE_DISABLED else {}),
    }
    for name, text in texts.items():
        _private(folder / name, text.encode())
    _private(folder / "munge.key", secrets.token_bytes(128))


def slurm_conf(folder: Path, shape: Shape, ports: Sequence[int], version: tuple[int, int]) -> str:
    """Slurm's configuration, of options that releases from 22.05 on have."""
    host = socket.gethostname().split(".")[0]
    user = user_name()
    last = shape.nodes - 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return f"""\
ClusterName=dev
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was requeued waits for so many seconds and one more; jobs have to start within it.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log

# Several nodes on one host, with more processors than there are, without cgroups and without root.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
MpiDefault=none
ReturnToService=2

# Everything soon: a dead node is found after 17 s, jobs are looked at every second.
SlurmdTimeout=10
MessageTimeout=5
SlurmctldTimeout=10
KillWait=5
InactiveLimit=0
OverTimeLimit=0
MinJobAge=600
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,preempt_send_user_signal
{"PreemptParameters=send_user_signal" if version >= _PREEMPTION_HAS_ITS_OWN else ""}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

{"GresTypes=gpu" if shape.gpus else ""}
NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port={_range(ports[1:])} CPUs={shape.cpus} \
RealMemory={memory}{f" Gres=gpu:{shape.gpus}" if shape.gpus else ""} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 State=UP
PartitionName=graceful Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime=30 State=UP
PartitionName=short Nodes=ALL MaxTime=1 MaxNodes=1 PriorityTier=1 State=UP
"""


def user_name() -> str:
    """The name of this process's user. Raises :class:`UserError` where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(
            f"user {os.getuid()} has no name, without which Slurm refuses to work; add one to /etc/passwd"
        ) from None


def _range(ports: Sequence[int]) -> str:
    return f"[{ports[0]}-{ports[-1]}]" if len(ports) > 1 else str(ports[0])


def _gres_conf(folder: Path, shape: Shape) -> str:
    if not shape.gpus:
        return "AutoDetect=off\n"
    files = f"gpu[0-{shape.gpus - 1}]" if shape.gpus > 1 else "gpu0"
    return f"AutoDetect=off\nNodeName=n[0-{shape.nodes - 1}] Name=gpu File={folder}/gpus/{files}\n"


def _profile(shape: Shape) -> str:
    return f"""\
# The cluster on this machine, for `sft-dist submit --cluster`.
partition: main
gpus_per_node: {shape.gpus}
tasks_per_node: {max(shape.gpus, 1)}
cpus_per_task: 1
time: "0:10:00"
shared_folder: /
requeue: {{max: 20}}
"""


def _private(path: Path, contents: bytes) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(contents)


def is_listened_on(port: int) -> bool:
    """Whether a process listens on a port of this machine, found without a connection that it would wonder about."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    # The second field is ADDRESS:PORT in hexadecimal, the fourth 0A for a socket that listens.
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def free_ports(count: int) -> list[int]:
    """So many ports in a row that nobody listens on, below those that the kernel gives to anybody who asks."""
    for _ in range(200):
        first = 10_000 + secrets.randbelow(22_000 - count)
        taken: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                taken.append(socket.socket())
                taken[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken[-1].bind(("", port))
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
        return list(range(first, first + count))
    raise UserError(f"no {count} free ports in a row between 10000 and 32000; ask for fewer --nodes")
