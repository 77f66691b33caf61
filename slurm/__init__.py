"""Profiles of clusters, and a real Slurm of several nodes on one machine for tests and for trying things out."""
