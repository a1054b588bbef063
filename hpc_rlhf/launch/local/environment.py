"""The environment of ranks that run without Slurm: threads, rendezvous, GPUs."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path

# Set by another launcher for another job, perhaps one that this process is part of. Ranks would take their
# rank from them, and requeue that job when they are asked to stop.
_FOREIGN = ("SLURM_", "SBATCH_", "SUBMITIT_", "OMPI_", "PMI_")
_FOREIGN_NAMES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK"})


def environment(inherited: Mapping[str, str], ranks_here: int, address: str = "127.0.0.1") -> dict[str, str]:
    """The environment of the ranks of one attempt.

    Args:
        inherited: this process's environment.
        ranks_here: ranks that share this machine's cores.
        address: address of rank 0's machine.
    """
    foreign = {name for name in inherited if name.startswith(_FOREIGN) or name in _FOREIGN_NAMES}
    env = {name: value for name, value in inherited.items() if name not in foreign}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks_here)))
    env.update(MASTER_ADDR=address, MASTER_PORT=str(free_port()))
    return env


def visible_gpus(env: Mapping[str, str]) -> int:
    """Number of NVIDIA GPUs that a rank would see, without loading torch."""
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])


def free_port() -> int:
    """A free port below the kernel's own range, so that it is still free when the ranks bind it.

    Drawn from the system's randomness: two processes with the same seed get different ports.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
