"""An exponential moving average of a model's weights, in float32, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.parallel.deepspeed_internals import full_numel, is_zero3, local_shard, replica_group
from hpc_rlhf.train.runtime.world import World


class Ema:
    """Averages the trained parameters: ``average = beta * average + (1 - beta) * weight``.

    Under ZeRO-3 each rank averages its own shard of every parameter. Otherwise parameter i belongs to rank
    ``i % size`` of those that hold the same layer shards. Either way, the average is stored exactly once across
    the ranks, in float32: in bfloat16 an update of 1 - beta = 0.8 % is lost to rounding.
    """

    def __init__(self, model: nn.Module, beta: float, world: World) -> None:
        self.beta = beta
        self.world = world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = {
            i: local_shard(parameter).float().clone()
            for i, parameter in enumerate(self.parameters)
            if is_zero3(parameter) or i % world.dims.data == world.data_rank
        }

    @torch.no_grad()
    def update(self) -> None:
        """Fold the current weights into the average."""
        for i, average in self.averages.items():
            average.lerp_(local_shard(self.parameters[i]).float(), 1 - self.beta)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Temporarily give the model the averaged weights. Collective."""
        group = None if self.world.dims.tensor == 1 else replica_group()
        originals = [local_shard(parameter).to("cpu", copy=True) for parameter in self.parameters]
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                weight = local_shard(parameter)
                if i in self.averages:
                    weight.copy_(self.averages[i])
                if not is_zero3(parameter):
                    dist.broadcast(weight, group=group, group_src=i % self.world.dims.data)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters, originals, strict=True):
                    local_shard(parameter).copy_(weight)

    def save(self, snapshot: Snapshot, name: str) -> None:
        """Add the averages to a snapshot's folder, for any number of ranks to resume from. Collective."""
        shards.write(snapshot, name, self._pieces(), {}, self.world)

    def load(self, folder: Path) -> None:
        shards.read(folder, list(self._pieces()), self.world)

    def _pieces(self) -> Iterator[Shard]:
        for i, average in self.averages.items():
            parameter = self.parameters[i]
            start, count = 0, average.numel()
            if is_zero3(parameter):  # the last rank's shard may be padded
                start = self.world.rank * count
                count = max(0, min(count, full_numel(parameter) - start))
            yield Shard(str(i), start, average.view(-1)[:count])
