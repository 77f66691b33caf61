"""Why a job waits, and how it ended, in words instead of Slurm's codes."""

from __future__ import annotations

_WAITS = {
    "Priority": "other jobs come first",
    "Resources": "it is next, and its nodes are not free yet",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for has failed, so it will never begin: cancel it",
    "BeginTime": "it may not begin before a set time",
    "JobHeldUser": "it is held: `scontrol release` lets it go",
    "JobHeldAdmin": "it is held by the administrators: ask them",
    "JobArrayTaskLimit": "as many tasks of its array run as may run at once",
    "PartitionTimeLimit": "its time limit is above that of the partition, so it will never begin: shorten `time`",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives to a job: lower `--nodes`",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node has what it asks for, so it will never begin: mend the cluster's profile",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation is gone",
    "Licenses": "a licence is not free",
    "AssocGrpGRES": "the account has all the GPUs that it may have",
    "InvalidAccount": "the account is not known: mend `account` in the cluster's profile",
    "InvalidQOS": "the quality of service is not known: mend `qos` in the cluster's profile",
    "launch failed requeued held": "it could not be started on its nodes and is held: `scontrol release` lets it go",
    "job requeued in held state": "it was put back and is held: `scontrol release` lets it go",
    "Cleaning": "what is left of it is being cleaned up before it begins again",
    "RaisedSignal": "a signal was raised",
}
# By the beginning of the code.
_FAMILIES = (
    ("QOSMax", "a limit of its quality of service on what one job or user may have"),
    ("QOSGrp", "a limit of its quality of service on what all together may have"),
    ("QOS", "a limit of its quality of service"),
    ("AssocMax", "a limit of the account on what one job or user may have"),
    ("AssocGrp", "a limit of the account on what all together may have"),
    ("Assoc", "a limit of the account"),
    ("MaxMem", "it asks for more memory per processor than is allowed"),
    ("MaxGRES", "it asks for more GPUs than is allowed"),
)
_ENDS = {
    "COMPLETED": "ended",
    "FAILED": "failed",
    "CANCELLED": "was cancelled",
    "TIMEOUT": "was killed at its time limit",
    "NODE_FAIL": "was lost with a node",
    "OUT_OF_MEMORY": "was killed: out of memory on a node",
    "PREEMPTED": "was preempted by another job",
    "DEADLINE": "was killed at its deadline",
    "BOOT_FAIL": "failed: its nodes did not boot",
    "LAUNCH_FAILED": "could not be started on its nodes",
}


def waits(code: str | None) -> str:
    """Why a job waits: words, and Slurm's own code behind them to look up."""
    if not code:
        return "Slurm has not said why"
    # Behind a comma Slurm names the nodes.
    name, _, more = code.partition(",")
    name = name.strip("() ")
    words = _WAITS.get(name) or next((text for start, text in _FAMILIES if name.startswith(start)), None)
    if words is None:
        return f"Slurm says {code.strip('()')}"
    nodes = more.partition(":")[2].strip(" )") if "Node" in name else ""
    return f"{words}{f': {nodes}' if nodes else ''} ({name})"


def ended(state: str) -> str:
    """How a job ended, by its state."""
    return _ENDS.get(state, f"ended as {state}")
