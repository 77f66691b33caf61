"""What this machine has to compute with, asked without torch so that every command answers at once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.hardware import cpu_has_bf16 as cpu_has_bf16

# The name comes last: it is the only field in which a comma could stand.
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,compute_cap,memory.total,name", "--format=csv,noheader,nounits")
_LIMIT_SECONDS = 5.0
_BF16_SINCE = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory_bytes` is 0 where the driver does not tell, as with memory shared with the processor."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


def gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that a process here would see, in the order of CUDA_VISIBLE_DEVICES where that is set.

    Empty without nvidia-smi, and when it fails or does not answer within five seconds. As in CUDA, the list
    ends at the first entry that names no device. MIG instances are not counted.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    found = _parse(_ask())
    if visible is None:
        return [gpu for _, gpu in found]
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        gpu = _named(entry.strip(), found)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return chosen


def _ask() -> str:
    try:
        asked = subprocess.Popen(
            _QUERY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return ""
    try:
        answer, _ = asked.communicate(timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        # Not waited for: inside a driver that hangs it cannot even be killed.
        asked.kill()
        return ""
    return answer if asked.returncode == 0 else ""


def _parse(answer: str) -> list[tuple[str, Gpu]]:
    """Lines of nvidia-smi as (UUID, GPU); what cannot be read is left out."""
    found = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",", 4)]
        try:
            index, uuid, capability, memory, name = fields
            major, minor = capability.split(".")
            size = int(memory) * 2**20 if memory.isdigit() else 0
            found.append((uuid, Gpu(int(index), name, (int(major), int(minor)), size)))
        except ValueError:
            continue
    return found


def _named(entry: str, found: Sequence[tuple[str, Gpu]]) -> Gpu | None:
    """The GPU that an entry of CUDA_VISIBLE_DEVICES names: its index, or an unambiguous start of its UUID."""
    if entry.startswith("GPU-"):
        meant = [gpu for uuid, gpu in found if uuid.startswith(entry)]
        return meant[0] if len(meant) == 1 else None
    return next((gpu for _, gpu in found if str(gpu.index) == entry), None)


def cpu_cores(membership: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, and the CPU quota of its cgroups (version 2), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_cgroups(membership, cgroups) if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *map(int, quotas)]))


def _own_cgroups(membership: Path, cgroups: Path) -> list[Path]:
    """The folder of this process's cgroup and of those around it: each may set a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = cgroups / own.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(cgroups))]


def _quota(folder: Path) -> float | None:
    """Cores by `cpu.max` ("QUOTA PERIOD", both in microseconds), or None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def bf16_supported(gpus: Sequence[Gpu]) -> tuple[bool, str]:
    """Whether training in bf16 has hardware behind it, and why: every GPU, or the processor without one."""
    if not gpus:
        able = cpu_has_bf16()
        return able, f"this processor has {'' if able else 'no '}bf16 instructions, and there is no GPU"
    for gpu in gpus:
        if gpu.compute_capability < _BF16_SINCE:
            has = ".".join(map(str, gpu.compute_capability))
            return False, f"GPU {gpu.index} ({gpu.name}) has compute capability {has}, bf16 needs 8.0"
    return True, f"{gpus[0].name} has bf16"
