"""Slurm's commands: asked with a limit of time, and what they answer as plain values."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence

from sft_dist.errors import UserError

_SECONDS = 20.0
# A field of `scontrol show -o`: its value ends where the next name begins, for values may hold blanks.
_FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w:/.-]*)=")
_NOISE = re.compile(r"^(?:\w+): (?:error|fatal): ", re.MULTILINE)


class SlurmRefused(UserError):
    """A command of Slurm's that answered no: `said` is what it printed, on one line."""

    def __init__(self, command: str, said: str) -> None:
        super().__init__(f"{command}: {said}")
        self.said = said


class SlurmDown(UserError):
    """Slurm is not there, or does not answer."""


def ask(
    words: Sequence[str], timeout_s: float = _SECONDS, *, text: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """What a command of Slurm's prints that is given `text` to read.

    `environment` goes over that of this process.
    Raises :class:`SlurmDown` where there is no Slurm or it does not answer in time, :class:`SlurmRefused` for a no.
    """
    command = words[0]
    if shutil.which(command) is None:
        raise SlurmDown(f"{command}: no such command: there is no Slurm here; log in to a node that has it")
    try:
        asked = subprocess.Popen(
            list(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {}), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
            start_new_session=True,
        )
        answer, complaint = asked.communicate(text, timeout=timeout_s)
    except OSError as error:
        raise SlurmDown(f"{command}: cannot be run: {error.strerror}; mend the installation of Slurm") from error
    except subprocess.TimeoutExpired:
        os.killpg(asked.pid, signal.SIGKILL)
        asked.communicate()
        raise SlurmDown(
            f"{command}: no answer within {timeout_s:g} s: Slurm is down or busy; try again later"
        ) from None
    if asked.returncode != 0:
        said = "; ".join(line for line in _NOISE.sub("", complaint or answer).splitlines() if line.strip())
        if "Unable to contact slurm controller" in said or "Connection refused" in said:
            raise SlurmDown(f"{command}: Slurm does not answer ({said}); try again later")
        raise SlurmRefused(command, said or f"failed with exit code {asked.returncode}")
    return answer


def fields(line: str) -> dict[str, str]:
    """The fields of one line of `scontrol show ... --oneliner`."""
    found = list(_FIELD.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def show(kind: str, name: str, timeout_s: float = _SECONDS) -> dict[str, str]:
    """What Slurm knows of one job, node or partition. Raises as :func:`ask` does."""
    lines = ask(["scontrol", "--oneliner", "show", kind, name], timeout_s).splitlines()
    return fields(next((line for line in lines if line.strip()), ""))


def expanded(nodes: str, timeout_s: float = _SECONDS) -> list[str]:
    """`n[0-1]` as n0 and n1."""
    return ask(["scontrol", "show", "hostnames", nodes], timeout_s).split()


def minutes(text: str) -> float | None:
    """A time of Slurm's (`D-HH:MM:SS`, `HH:MM:SS`, `MM:SS`, minutes) in minutes; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *rest = (int(group) if group else None for group in match.groups())
    first, second, third = rest
    assert first is not None
    if days is not None or third is not None:
        # With days the first is hours, with three numbers as well.
        return (days or 0) * 1440 + first * 60 + (second or 0) + (third or 0) / 60
    return first + (second or 0) / 60
