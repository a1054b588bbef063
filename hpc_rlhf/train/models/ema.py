"""An exponential moving average of a model's weights, in float32, each rank keeping a share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Piece
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.parallel.tensor_parallel import replicas
from hpc_rlhf.train.runtime.world import World


class Ema:
    """Averages the trained parameters: ``average = beta * average + (1 - beta) * weight``.

    Under ZeRO-3 a rank averages its own shard of every parameter; otherwise parameter i belongs to rank
    ``i % size`` of those that have the same parts of layers. So all ranks together keep the average once. Float32
    throughout: in bfloat16 an update of 1 - beta = 0.8 % is lost to rounding.
    """

    def __init__(self, model: nn.Module, beta: float, world: World) -> None:
        self.beta = beta
        self.world = world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = {i: self._weight(p).float().clone() for i, p in self._owned()}

    @staticmethod
    def _weight(parameter: Any) -> Tensor:
        return parameter.ds_tensor.detach() if hasattr(parameter, "ds_id") else parameter.detach()

    def _owner(self, i: int) -> int:
        return i % self.world.dims.data

    def _owned(self) -> Iterator[tuple[int, nn.Parameter]]:
        for i, parameter in enumerate(self.parameters):
            if hasattr(parameter, "ds_id") or self._owner(i) == self.world.data_rank:
                yield i, parameter

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        for i, parameter in self._owned():
            self.averages[i].lerp_(self._weight(parameter).float(), 1 - self.beta)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model has the averaged weights. Collective."""
        group = replicas(self.world.dims.tensor)
        kept = [self._weight(parameter).to("cpu", copy=True) for parameter in self.parameters]
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                weight = self._weight(parameter)
                if i in self.averages:
                    weight.copy_(self.averages[i])
                if not hasattr(parameter, "ds_id"):
                    dist.broadcast(weight, group=group, group_src=self._owner(i))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters, kept, strict=True):
                    self._weight(parameter).copy_(weight)

    def save(self, snapshot: Snapshot, name: str) -> None:
        """Put the averages into a snapshot's folder, for any number of ranks to go on from. Collective."""
        shards.write(snapshot, name, self._pieces(), {}, self.world)

    def load(self, folder: Path) -> None:
        """Put back what ``save`` wrote."""
        shards.read(folder, list(self._pieces()), self.world)

    def _pieces(self) -> Iterator[Piece]:
        for i, average in self.averages.items():
            parameter: Any = self.parameters[i]
            start, count = 0, average.numel()
            if hasattr(parameter, "ds_id"):  # the last rank's shard may be padded
                start = self.world.rank * count
                count = max(0, min(count, parameter.ds_numel - start))
            yield Piece(str(i), start, average.view(-1)[:count])
