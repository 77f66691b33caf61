"""The profile of a cluster: one YAML file that says what a job on it has to ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from launch.devices import Gpu
from launch.slurm.commands import minutes
from launch.typed_yaml import read_typed
from sft_dist.config import Location, Name, Section
from sft_dist.errors import UserError

_SECRET = re.compile(r"(?i)\b\w*(key|token|secret|password)\w*\s*=\s*\S")
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|password)")
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
        "takes it to the job"
    )


def _words(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name, word in value.items():
        if isinstance(word, dict | list) or word is None:
            raise ValueError(f"{name} should be one word")
        if _SECRET_NAME.search(str(name)):
            raise _in_the_script(name)
    return {name: str(word).lower() if isinstance(word, bool) else str(word) for name, word in value.items()}


def _no_secret(lines: list[str]) -> list[str]:
    for line in lines:
        if "\n" in line:
            raise ValueError("a line of the set-up holds a line break; make it two")
        if found := _SECRET.search(line):
            raise _in_the_script(found[0].split("=")[0].strip())
    return lines


Words = Annotated[dict[str, str], BeforeValidator(_words)]
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
    environment: Words = Field(default_factory=dict)
    """Variables of the workers, such as NCCL_SOCKET_IFNAME. No secrets: they would be written into the script."""
    container: ContainerSection | None = None
    """Run the workers in a container."""
    python: Name | None = None
    """Python of the workers; unset: the one that `sft-dist` runs in."""
    shared_folder: Location | None = None
    """Folder that all nodes see; a run outside of it is refused. Unset: nothing is known."""
    requeue: RequeueSection = Field(default_factory=RequeueSection)
    sbatch: Words = Field(default_factory=dict)
    """Further options of sbatch, without dashes."""
    srun: list[Name] = Field(default_factory=list)
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
