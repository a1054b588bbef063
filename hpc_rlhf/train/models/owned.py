"""Tensors of a model whose copies are divided over the ranks, so that each copy exists once.

Tensor i belongs to rank ``i % replicas`` of those that hold the same part of the model. Under ZeRO-3, each rank owns
its shard of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from hpc_rlhf.train.parallel.deepspeed_internals import (
    full_numel,
    is_zero3,
    local_shard,
    replica_group,
    set_local_shard,
)
from hpc_rlhf.train.runtime.world import World


def owns(tensor: Tensor, number: int, world: World) -> bool:
    """Whether this rank owns a tensor, or a shard of it."""
    return is_zero3(tensor) or number % world.dims.replicas == world.replica_rank


def span(tensor: Tensor, world: World) -> tuple[int, int]:
    """The first element of what ``local_shard`` returns, and the number of elements without padding."""
    count = local_shard(tensor).numel()
    if not is_zero3(tensor):
        return 0, count
    start = world.rank * count
    return start, max(0, min(count, full_numel(tensor) - start))


@contextmanager
def replaced(tensors: Mapping[int, Tensor], values: Mapping[int, Tensor], world: World) -> Iterator[None]:
    """Temporarily give tensors other values. Collective.

    Args:
        tensors: by their numbers, the same on every rank.
        values: of the tensors that this rank owns, as ``local_shard`` returns them.
    """
    group = None if world.dims.tensor == 1 else replica_group()
    originals = {i: local_shard(tensor).to("cpu", copy=True) for i, tensor in tensors.items()}
    try:
        for i, tensor in tensors.items():
            if i in values:
                set_local_shard(tensor, values[i])
            if not is_zero3(tensor):
                dist.broadcast(local_shard(tensor), group=group, group_src=i % world.dims.replicas)
        yield
    finally:
        for i, original in originals.items():
            set_local_shard(tensors[i], original)
