"""A real Slurm of several nodes on this machine, as any user, that leaves nothing behind."""

from slurm.dev_cluster.cluster import DevCluster
from slurm.dev_cluster.programs import missing

__all__ = ["DevCluster", "missing"]
