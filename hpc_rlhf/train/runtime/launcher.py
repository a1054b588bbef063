"""The rank of this process, as its launcher sets it. Loads no torch."""

from __future__ import annotations

import os

# Launchers' variables for the rank, the number of ranks, and the rank within its node.
LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
)


def launcher_ranks() -> tuple[int, int, int]:
    """Rank, number of ranks and local rank, as this process's launcher sets them; (0, 1, 0) without one."""
    order: tuple[tuple[str, str, str], ...] = LAUNCHER_VARIABLES
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # may itself run inside a Slurm allocation
        order = (LAUNCHER_VARIABLES[2],)
    for names in order:
        if all(name in os.environ for name in names):
            rank, size, local = (int(os.environ[name]) for name in names)
            return rank, size, local
    return 0, 1, 0
