"""The batch script of a run, through submitit's executor.

submitit writes the head and the call of srun; what stands around it makes the job survive: before srun the attempt is
noted and the ranks are told where to meet, and after it one process decides what the end of the step means, whatever
died in it. An attempt on the same nodes is the same script once more.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.local import base_environment
from launch.slurm.profile import Profile
from launch.slurm.records import SlurmDir
from sft_dist.errors import UserError

# Exit codes of `launch.slurm.before` and `launch.slurm.after` that the script acts on.
NOTHING_TO_DO = 3
AGAIN = 4
FAILED = 5
# What the script hands to the tasks: `ADDRESS PORT ATTEMPT`.
RENDEZVOUS = "SFT_DIST_RENDEZVOUS"
# In the script of an array: the folder of the run that a job of it is for.
_RUN = "SFT_DIST_RUN"


def executor(
    root: Path,
    name: str,
    profile: Profile,
    nodes: int,
    tasks: int,
    after: Sequence[str] = (),
    runs: Sequence[Path] = (),
) -> Any:
    """submitit's executor for a run in `root`: `nodes` of `tasks` processes each, once the jobs in `after` are done.

    `runs`: the folders of several, each of which a job of an array is for; `root` then keeps what is of all of them.

    Raises :class:`UserError` where there is no Slurm on this machine.
    """
    import submitit

    at = SlurmDir(root)
    try:
        made = submitit.SlurmExecutor(folder=at.folder, python=_python(profile))
    except RuntimeError as error:
        raise UserError("srun: no such command: there is no Slurm here; log in to a node that has it") from error
    made.update_parameters(**_parameters(at, name, profile, nodes, tasks, after))
    if runs:
        made.update_parameters(setup=_setup(at, profile, runs), teardown=_teardown(at, is_array=True))
    return made


def text(executor: Any) -> str:
    """The script as submitit submits it."""
    script: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return script


def _parameters(
    at: SlurmDir, name: str, profile: Profile, nodes: int, tasks: int, after: Sequence[str]
) -> dict[str, Any]:
    asked = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "mem": profile.memory_per_node,
        "exclusive": profile.exclusive or None,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
    }
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": profile.cpus_per_task,
        "time": math.ceil(profile.time_minutes),
        "signal_delay_s": profile.signal_seconds,
        "comment": str(at.root.absolute()),
        "stderr_to_stdout": True,
        "setup": _setup(at, profile),
        "teardown": _teardown(at),
        "srun_args": _srun(at, profile),
        "additional_parameters": _additional(at, profile, after),
        **{key: value for key, value in asked.items() if value is not None},
    }


def _additional(at: SlurmDir, profile: Profile, after: Sequence[str]) -> dict[str, Any]:
    """Options of sbatch that submitit has no name for. The batch script has a log of its own."""
    gpus = f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)
    return {
        "output": str(at.folder.absolute() / "job-%j.out"),
        "chdir": os.getcwd(),
        "requeue": True,
        **({"gpus-per-node": gpus} if profile.gpus_per_node else {}),
        **({"reservation": profile.reservation} if profile.reservation else {}),
        # A stage whose input will never be made does not wait for it for ever.
        **({"kill-on-invalid-dep": "yes"} if after else {}),
        **{name: True if word == "true" else word for name, word in profile.sbatch.items() if word != "false"},
    }


def _setup(at: SlurmDir, profile: Profile, runs: Sequence[Path] = ()) -> list[str]:
    """Lines before srun. A run that is done by now ends the job well."""
    lines = [*profile.setup, *(f"export {name}={shlex.quote(word)}" for name, word in profile.environment.items())]
    if paths := base_environment({}).get("PYTHONPATH"):
        lines.append(f'export PYTHONPATH={shlex.quote(paths)}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    if runs:
        # What is said of a run lies with it, as where it is alone.
        lines = [
            f"runs=({shlex.join(str(run.absolute()) for run in runs)})",
            f"{_RUN}=${{runs[$SLURM_ARRAY_TASK_ID]}}",
            f'exec >> "${_RUN}/slurm/job-$SLURM_JOB_ID.out" 2>&1',
            *lines,
        ]
    return [
        *lines,
        f"{RENDEZVOUS}=$({_module('launch.slurm.before', at, bool(runs))})",
        f"case $? in 0) export {RENDEZVOUS};; {NOTHING_TO_DO}) exit 0;; *) exit 2;; esac",
    ]


def _teardown(at: SlurmDir, is_array: bool = False) -> list[str]:
    """Lines after srun. On the same nodes the whole script is run once more, in this process."""
    return [
        "code=$?",
        f'{_module("launch.slurm.after", at, is_array)} "$code" "${RENDEZVOUS}"',
        f'case $? in {AGAIN}) exec bash "$0";; {FAILED}) exit 1;; esac',
        'exit "$code"',
        "",
    ]


def _module(name: str, at: SlurmDir, is_array: bool) -> str:
    command = shlex.join([sys.executable, "-m", name])
    return f'{command} "${_RUN}"' if is_array else f"{command} {shlex.quote(str(at.root.absolute()))}"


def _srun(at: SlurmDir, profile: Profile) -> list[str]:
    """One rank that fails takes all down; ranks are counted node by node."""
    words = ["--output", str(at.folder.absolute() / "tasks-%j.out"), "--kill-on-bad-exit=1", "--distribution=block"]
    if profile.container is not None:
        words.append(f"--container-image={profile.container.image}")
        if profile.container.mounts:
            words.append(f"--container-mounts={','.join(profile.container.mounts)}")
    # Slurm has not handed them on since 22.05.
    words.append(f"--cpus-per-task={profile.cpus_per_task}")
    return [*words, *profile.srun]


def _python(profile: Profile) -> str:
    return profile.python or shlex.quote(sys.executable)
