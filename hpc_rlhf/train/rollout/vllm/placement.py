"""Which rank starts which server of vLLM, and on which GPUs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.runtime.world import World


@dataclass(frozen=True)
class Place:
    """Where a server runs.

    Attributes:
        rank: that starts and drives it.
        gpus: of its machine, as in CUDA_VISIBLE_DEVICES; empty on CPUs, and on a node of its own, where an ``agent``
            knows them.
    """

    rank: int
    gpus: list[str]


def places(spec: RolloutSpec, world: World, slurm: SlurmSpec, where: str) -> list[Place]:
    """The places of a stage's servers. Colocated, each group of ranks shares its GPUs with its server. Separate, the
    servers have GPUs on which no rank trains: on nodes of their own, or on those of the ranks that drive them, as do
    all servers if the stage runs on this machine without Slurm. Collective.

    Args:
        where: the field of the spec with the settings.

    Raises:
        HpcRlhfError: the ranks do not see these GPUs.
    """
    machines: list[tuple[str, str, list[str]]] = world.gather((socket.gethostname(), *_gpus()))
    size = spec.tensor_parallel
    if spec.placement == "colocated":
        shared = [[gpu for _, gpu, _ in machines[first : first + size] if gpu] for first in range(0, world.size, size)]
        servers, others = [Place(number * size, gpus) for number, gpus in enumerate(shared)], "no GPU but its own"
    else:
        count = spec.servers(slurm) * (spec.own_nodes or world.size // slurm.tasks_per_node)
        drivers = [number * world.size // count for number in range(count)]
        if spec.own_nodes and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            return [Place(rank, []) for rank in drivers]
        training = {(host, gpu) for host, gpu, _ in machines}
        free = {host: [gpu for gpu in visible if (host, gpu) not in training] for host, _, visible in machines}
        servers, others = [], "too few GPUs besides those that train"
        for host, rank in ((machines[rank][0], rank) for rank in drivers):
            servers.append(Place(rank, free[host][:size]))
            free[host] = free[host][size:]
    if machines[0][1] and any(len(set(place.gpus)) < size for place in servers):
        raise HpcRlhfError(f"each rank sees {others}", where, "use slurm.launcher: torchrun")
    return servers


def _gpus() -> tuple[str, list[str]]:
    """What CUDA_VISIBLE_DEVICES calls this rank's GPU, and all that it sees; empty without any."""
    if not torch.cuda.is_available():
        return "", []
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = names.split(",") if names else [str(number) for number in range(torch.cuda.device_count())]
    return visible[torch.cuda.current_device()], visible
