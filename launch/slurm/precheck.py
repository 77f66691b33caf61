"""What would fail in the queue or on a node, told before anything is queued."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import check
from launch.place import Place
from launch.slurm.commands import SlurmRefused, ask, fields, minutes
from launch.slurm.profile import Profile
from sft_dist.config import Recipe
from sft_dist.data.mixture_sources import key_of, sources_of
from sft_dist.data.sources import is_local
from sft_dist.errors import UserError

# Of what sbatch says, and the key of the profile that is meant, with the mend.
_MEANT = (
    ("invalid account", "account", "name one of yours: sacctmgr show assoc user=$USER"),
    ("qos", "qos", "see: sacctmgr show qos"),
    ("partition name", "partition", "see: sinfo"),
    ("time limit", "time", "lower it"),
    ("feature", "constraint", "see: sinfo -o %f"),
    ("reservation", "reservation", "see: scontrol show reservation"),
    ("memory specification", "memory_per_node", "lower it"),
    ("cpu count", "cpus_per_task", "lower it"),
    ("node count", "--nodes", "ask for fewer"),
)


def refuse(recipe: Recipe, profile: Profile, cluster: str, place: Place) -> list[str]:
    """Raise :class:`UserError` with every fault, one a line; lines that are worth knowing where there is none."""
    partition = _partition(profile, cluster)
    faults = [
        *_limits(profile, cluster, partition, place),
        *_accounts(profile, cluster),
        *_shared(recipe, profile, cluster),
    ]
    if profile.signal_seconds <= recipe.checkpoint.grace:
        faults.append(
            f"{cluster}: signal_seconds: {profile.signal_seconds} s before the time limit is not more than the "
            f"{recipe.checkpoint.grace:g} s of checkpoint.grace; raise it"
        )
    found = check.findings(recipe, place)
    faults += [finding.text for finding in found if finding.level == "fault"]
    faults += [
        f"{f.text}; fetch it first: the nodes may see no more than this" for f in found if f.level == "unverified"
    ]
    if faults:
        raise UserError("\n".join(faults))
    return [finding.text for finding in found]


def test_only(script: str, cluster: str) -> str:
    """What Slurm makes of a script without queueing it: when and where it would start. Raises :class:`UserError`."""
    try:
        said = ask(["sh", "-c", "sbatch --test-only 2>&1"], text=script)
    except SlurmRefused as error:
        for part, key, mend in _MEANT:
            if part in error.said.lower():
                raise UserError(f"{cluster}: {key}: Slurm says: {error.said}; {mend}") from None
        raise UserError(
            f"{cluster}: Slurm says: {error.said}; ask for fewer nodes, or less of a node (gpus_per_node, gpu_type, "
            "cpus_per_task, memory_per_node, constraint)"
        ) from None
    return said.strip().removeprefix("sbatch: ")


def _partition(profile: Profile, cluster: str) -> dict[str, str]:
    """What Slurm knows of the partition. Raises :class:`UserError` where there is none of the name."""
    known = [fields(line) for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines() if line.strip()]
    if profile.partition is None:
        default = next((one for one in known if one.get("Default") == "YES"), None)
        if default is None:
            raise UserError(f"{cluster}: partition: is not set, and the cluster has no default; {_named(known)}")
        return default
    # Slurm takes a list and starts in whichever comes first; the first stands for all.
    wanted = profile.partition.split(",")[0]
    found = next((one for one in known if one.get("PartitionName") == wanted), None)
    if found is None:
        raise UserError(f"{cluster}: partition: this cluster has no partition {wanted}; {_named(known)}")
    return found


def _named(known: Sequence[dict[str, str]]) -> str:
    return f"take one of {', '.join(one['PartitionName'] for one in known if 'PartitionName' in one)}"


def _limits(profile: Profile, cluster: str, partition: dict[str, str], place: Place) -> Iterator[str]:
    name = partition.get("PartitionName", "")
    most = [int(word) for key in ("MaxNodes", "TotalNodes") if (word := partition.get(key, "")).isdigit()]
    if most and place.nodes > min(most):
        yield f"--nodes: {place.nodes} is more than the {min(most)} that a job gets in partition {name}; ask for fewer"
    longest = minutes(partition.get("MaxTime", ""))
    if longest is not None and profile.time_minutes > longest:
        yield (
            f"{cluster}: time: {profile.time} is longer than the {partition['MaxTime']} of the partition {name}; lower "
            "it: a longer training goes on in the next job"
        )
    if partition.get("State", "UP") != "UP":
        yield f"{cluster}: partition: {name} is {partition['State']}; wait, or take another"
    if profile.time_minutes * 60 <= profile.signal_seconds:
        yield (
            f"{cluster}: signal_seconds: {profile.signal_seconds} s before the end leaves nothing of a time limit of "
            f"{profile.time}; lower it, or raise time"
        )
    if profile.gpus_per_node and place.processes > profile.gpus_per_node:
        yield (
            f"{cluster}: tasks_per_node: {place.processes} processes on {profile.gpus_per_node} GPUs; "
            "make it one per GPU (parallel.processes of the recipe counts, too)"
        )


def _accounts(profile: Profile, cluster: str) -> Iterator[str]:
    """Slurm takes any account and quality of service where it keeps no accounts, as if it knew them."""
    asked = {key: word for key, word in (("account", profile.account), ("qos", profile.qos)) if word is not None}
    if not asked:
        return
    config = ask(["scontrol", "show", "config"])
    if "accounting_storage/none" in config or "AccountingStorageType   = (null)" in config:
        for key, word in asked.items():
            yield f"{cluster}: {key}: this cluster keeps no accounts and knows no {key} {word}; leave it out"
        return
    user = getpass.getuser()
    try:
        lines = ask(["sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,qos"]).splitlines()
    except UserError:
        return
    accounts = {line.split("|")[0] for line in lines}
    if profile.account is not None and lines and profile.account not in accounts:
        yield f"{cluster}: account: {user} has no account {profile.account}; take one of {', '.join(sorted(accounts))}"
    names = {name for line in lines for name in line.split("|")[-1].split(",") if name}
    if profile.qos is not None and names and profile.qos not in names:
        yield f"{cluster}: qos: {user} has no quality of service {profile.qos}; take one of {', '.join(sorted(names))}"


def _shared(recipe: Recipe, profile: Profile, cluster: str) -> Iterator[str]:
    """What lies where the nodes do not see it."""
    if profile.shared_folder is None:
        return
    shared = Path(profile.shared_folder).resolve()
    if not shared.is_dir():
        yield f"{cluster}: shared_folder: no such folder: {shared}; name one that all nodes see"
        return
    asked = [("output.output_dir", recipe.output.output_dir), ("the working folder", os.getcwd())]
    named = [
        ("model.model_name_or_path", recipe.model.model_name_or_path),
        *((key_of(recipe.data, name), source.dataset_name) for name, source in sources_of(recipe.data).items()),
        ("data.dataset_test_split", recipe.data.dataset_test_split or ""),
    ]
    asked += [(key, name) for key, name in named if name and is_local(name)]
    for key, name in asked:
        if not Path(name).expanduser().resolve().is_relative_to(shared):
            yield f"{key}: {name} is not in {shared} (shared_folder of {cluster}): the nodes cannot see it; move it"
