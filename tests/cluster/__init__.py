"""A real, throwaway Slurm on this host: four nodes with two fake GPUs each, accounting included."""

from tests.cluster.cluster import Cluster, ClusterError, wait_until, why_not

__all__ = ["Cluster", "ClusterError", "wait_until", "why_not"]
