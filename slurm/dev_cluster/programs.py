"""Slurm's programs on this machine, and what to install where they are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sft_dist.errors import UserError

DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "scontrol", "sinfo", "srun")
# Daemons lie where an ordinary user's PATH does not go.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing() -> list[str]:
    """What a cluster needs and this machine does not have; empty where one can be started."""
    if sys.platform != "linux":
        return ["Linux"]
    return [name for name in (*DAEMONS, *_COMMANDS) if shutil.which(name, path=_PATH) is None]


def find() -> dict[str, str]:
    """The path of each daemon. Raises :class:`UserError` that says what to install."""
    lacking = missing()
    if lacking == ["Linux"]:
        raise UserError(f"dev-cluster: Slurm's daemons run on Linux only, this is {sys.platform}; take a Linux machine")
    if lacking:
        raise UserError(
            f"dev-cluster: needs Slurm, but {', '.join(lacking)} is missing; `apt-get install slurm-wlm munge` "
            "(Debian, Ubuntu), or `dnf install slurm-slurmctld slurm-slurmd munge` (Fedora, EPEL)"
        )
    return {name: Path(shutil.which(name, path=_PATH) or name).as_posix() for name in DAEMONS}


def version(slurmd: str) -> tuple[int, int]:
    """Slurm's release, such as (22, 5); (0, 0) where it does not say."""
    try:
        said = subprocess.run([slurmd, "-V"], capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    found = re.search(r"(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)
