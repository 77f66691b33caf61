"""The profile of a cluster: one YAML file that says what a job on it has to ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from launch.devices import Gpu
from launch.slurm.commands import minutes
from launch.typed_yaml import read_typed
from sft_dist.config_base import Location, Name, Section
from sft_dist.errors import UserError
from sft_dist.rundir import SECRET

# Of a value that is written there; `$(cat FILE)` is none.
_WORD = r"[\w-]*(?:key|token|secret|password)[\w-]*"
_SECRET = re.compile(rf"""(?i)(?<![\w-])({_WORD}\s*=|--{_WORD}\s)\s*["']?[^\s"'$=]""")
# Names that hold such a word and no secret.
_NO_SECRET = re.compile(r"(?i)^TOKENIZERS_|_(path|file|dir)$")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# Options of sbatch that have a key of their own here, by name.
_KEYS = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint",
         "reservation": "reservation", "exclude": "exclude", "nodes": "nodes", "gpus-per-node": "gpus_per_node",
         "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "mem": "memory_per_node",
         "exclusive": "exclusive", "time": "time", "signal": "signal_seconds"}  # fmt: skip
# By these the run is found again, started again and kept apart from others.
_OURS = ("array", "chdir", "comment", "dependency", "error", "job-name", "no-requeue", "ntasks", "open-mode",
         "output", "requeue", "wrap")  # fmt: skip
# By NVIDIA's list of devices: the first name that is part of `gpu_type` counts.
_CAPABILITY = {"v100": (7, 0), "t4": (7, 5), "a100": (8, 0), "a800": (8, 0), "a10": (8, 6), "a40": (8, 6),
               "a6000": (8, 6), "l4": (8, 9), "rtx6000": (8, 9), "h100": (9, 0), "h800": (9, 0), "h200": (9, 0),
               "gh200": (9, 0), "b200": (10, 0), "gb200": (10, 0)}  # fmt: skip
_GIB = 2**30


def _time(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str) or not minutes(str(value)):
        raise ValueError(f"{value!r} is no time; write D-HH:MM:SS, HH:MM:SS or minutes")
    return str(value)


def _in_the_script(name: str) -> ValueError:
    return ValueError(
        f"{name} would be written into the job's script; export it where you call `sft-dist submit`, from where Slurm "
        "takes it to the job, or read it from a file of yours in a line of setup: export NAME=$(cat FILE)"
    )


def _words(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name, word in value.items():
        if isinstance(word, dict | list) or word is None:
            raise ValueError(f"{name} should be one word")
        if _names_a_secret(str(name)):
            raise _in_the_script(name)
        _no_secret([str(word)])
    return {name: str(word).lower() if isinstance(word, bool) else str(word) for name, word in value.items()}


def _variables(words: dict[str, str]) -> dict[str, str]:
    for name in words:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable")
    return words


def _options(words: dict[str, str]) -> dict[str, str]:
    for name in words:
        if not _OPTION.fullmatch(name):
            raise ValueError(f"{name!r} is no option of sbatch; write its long name without dashes")
        if name in _KEYS:
            raise ValueError(f"{name} has a key of its own here: set {_KEYS[name]}")
        if name in _OURS:
            raise ValueError(f"{name} is set by sft-dist itself; leave it out")
    return words


def _names_a_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and not _NO_SECRET.search(name)


def _no_secret(lines: list[str]) -> list[str]:
    for line in lines:
        if "\n" in line:
            raise ValueError("a line holds a line break; make it two")
        for found in _SECRET.finditer(line):
            name = found[1].strip("-= ")
            if not _NO_SECRET.search(name):
                raise _in_the_script(name)
    return lines


Variables = Annotated[dict[str, str], BeforeValidator(_words), AfterValidator(_variables)]
Options = Annotated[dict[str, str], BeforeValidator(_words), AfterValidator(_options)]
Lines = Annotated[list[Name], AfterValidator(_no_secret)]


class RequeueSection(Section):
    """What is done when a job ends before its training does."""

    max: NonNegativeInt = 100
    """How often the job may go back into the queue; a time limit, a preemption and a failure count alike."""
    in_place: bool = True
    """After a failure, start again on the same nodes first, without the queue, where all of them answer."""
    same_step: PositiveInt = 3
    """So many attempts in a row that end at the same step end the run."""


class ContainerSection(Section):
    """A container that the workers run in, by the Pyxis plugin of Slurm."""

    image: Name
    """What `srun --container-image` takes."""
    mounts: list[Name] = Field(default_factory=list)
    """What `srun --container-mounts` takes; the run's folder has to be among them."""


class Profile(Section):
    """What a job on a cluster asks for. Names are those of sbatch, where it has one."""

    partition: Name | None = None
    """Unset: the cluster's default."""
    account: Name | None = None
    """Account that is charged."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Name | None = None
    """Features that the nodes must have."""
    reservation: Name | None = None
    """Reservation to run in."""
    exclude: Name | None = None
    """Nodes that are never taken."""
    nodes: PositiveInt = 1
    """Nodes where `--nodes` says nothing."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs that are asked for on each node."""
    gpu_type: Name | None = None
    """Type of the GPUs, as the cluster calls it (`--gpus-per-node=TYPE:N`)."""
    gpu_memory_gb: NonNegativeFloat = 0
    """Memory of one GPU in GiB, by which `parallel.strategy=auto` chooses; 0: not known."""
    tasks_per_node: PositiveInt | None = None
    """Processes on each node; unset: `parallel.processes` of the recipe, or one per GPU, or one."""
    cpus_per_task: PositiveInt = 1
    """Cores of each process."""
    memory_per_node: Name | None = None
    """Memory of each node, such as 480G; `0` is all of it. Unset: the cluster's default."""
    exclusive: bool = False
    """Take whole nodes."""
    time: Annotated[str, BeforeValidator(_time)] = "1-00:00:00"
    """Time limit of one job; a longer training goes on in the next."""
    signal_seconds: Annotated[int, Field(ge=30)] = 120
    """Seconds before the time limit at which the run saves and stops; above the recipe's `checkpoint.grace`."""
    setup: Lines = Field(default_factory=list)
    """Lines of shell before the workers: modules, a virtual environment."""
    environment: Variables = Field(default_factory=dict)
    """Variables of the workers, such as NCCL_SOCKET_IFNAME. No secrets: they would be written into the script."""
    container: ContainerSection | None = None
    """Run the workers in a container."""
    python: Name | None = None
    """Python of the workers; unset: the one that `sft-dist` runs in."""
    shared_folder: Location | None = None
    """Folder that all nodes see; a run outside of it is refused. Unset: nothing is known."""
    requeue: RequeueSection = Field(default_factory=RequeueSection)
    sbatch: Options = Field(default_factory=dict)
    """Further options of sbatch, by their long names without dashes; `true` for one that takes no value."""
    srun: Lines = Field(default_factory=list)
    """Further options of srun, each one word."""

    @property
    def time_minutes(self) -> float:
        found = minutes(self.time)
        assert found is not None
        return found

    def gpus(self) -> list[Gpu]:
        """The GPUs of one node, as far as the profile tells."""
        name = self.gpu_type or "GPU"
        # What is not known counts as new: the workers look at the device itself.
        capability = next((c for part, c in _CAPABILITY.items() if part in name.lower()), (8, 0))
        memory = int(self.gpu_memory_gb * _GIB)
        return [Gpu(index, name, capability, memory) for index in range(self.gpus_per_node)]


def read_profile(file: Path) -> Profile:
    """The profile in a file. Raises :class:`UserError` with all faults, one a line."""
    if not file.exists():
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        raise UserError(f"--cluster: {file}: no such file; copy one of {FOLDER} ({', '.join(known)}) and fill it in")
    return read_typed(file, Profile, "the profile of a cluster")


FOLDER = Path(__file__).resolve().parent.parent.parent / "slurm" / "clusters"
