"""An exponential moving average of a model's weights, in float32, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models import owned
from hpc_rlhf.train.models.export import gathered
from hpc_rlhf.train.models.lora import Adapter, adapters
from hpc_rlhf.train.parallel.deepspeed_internals import full_numel, full_shape, is_zero3, local_shard, replica_group
from hpc_rlhf.train.parallel.tensor_parallel import split_of
from hpc_rlhf.train.runtime.world import World


class Ema:
    """Averages the trained weights: ``average = beta * average + (1 - beta) * weight``.

    Each rank averages the parameters that it owns; see ``owned``. The averages are float32: in bfloat16 an update of
    1 - beta = 0.8 % is lost to rounding.

    For an adapter, it averages the update to the layer's weight. The product of averaged factors would be another
    matrix, because both factors change.

    Attributes:
        parameters: the trained parameters except the factors of adapters, by their number among all trained ones.
        averages: those that this rank keeps.
        adapters: the averages of adapters' updates.
    """

    def __init__(self, model: nn.Module, beta: float, world: World) -> None:
        self.beta = beta
        self.world = world
        layers = adapters(model)
        trained = {parameter: i for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad)}
        self._factors = [(trained.pop(layer.lora_a), trained.pop(layer.lora_b)) for layer in layers]
        self.parameters = {i: parameter for parameter, i in trained.items()}
        self.averages = {
            i: local_shard(parameter).float().clone()
            for i, parameter in self.parameters.items()
            if owned.owns(parameter, i, world)
        }
        with _whole_factors(layers), torch.no_grad():
            self.adapters = [AdapterAverage(layer, number, world) for number, layer in enumerate(layers)]

    @torch.no_grad()
    def update(self) -> None:
        """Fold the current weights into the average. Collective under ZeRO-3."""
        for i, average in self.averages.items():
            average.lerp_(local_shard(self.parameters[i]).float(), 1 - self.beta)
        with _whole_factors([adapter.layer for adapter in self.adapters]):
            for adapter in self.adapters:
                part = adapter.part(adapter.layer.lora_a, adapter.layer.lora_b)
                adapter.average.lerp_(part.to(adapter.average.device), 1 - self.beta)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Temporarily give the model the averaged weights; those of adapters where they are exported. Collective."""
        with owned.replaced(self.parameters, self.averages, self.world):
            for adapter in self.adapters:
                adapter.layer.averaged_update = adapter.whole
            try:
                yield
            finally:
                for adapter in self.adapters:
                    adapter.layer.averaged_update = None

    def save(self, snapshot: Snapshot, name: str) -> None:
        """Add the averages to a snapshot's folder, for any number of ranks to resume from. Collective."""
        shards.write(snapshot, name, self.pieces(), {"adapters": len(self.adapters)}, self.world)

    def load(self, folder: Path) -> None:
        if self.adapters and "adapters" not in shards.read_facts(folder):
            self._load_factors(folder)
        else:
            shards.read(folder, list(self.pieces()), self.world)

    def _load_factors(self, folder: Path) -> None:
        """Start the averages of updates from what earlier versions kept: averages of their factors."""
        shards.read(folder, list(self._own_pieces()), self.world)
        for adapter, numbers in zip(self.adapters, self._factors, strict=True):
            factors = [torch.zeros(full_shape(f)) for f in (adapter.layer.lora_a, adapter.layer.lora_b)]
            pieces = [Shard(str(i), 0, factor.view(-1)) for i, factor in zip(numbers, factors, strict=True)]
            shards.read(folder, pieces, self.world)
            adapter.average.copy_(adapter.part(*factors))

    def pieces(self) -> Iterator[Shard]:
        """Views of the averages that this rank keeps."""
        yield from self._own_pieces()
        for number, adapter in enumerate(self.adapters):
            if adapter.average.numel():
                split = split_of(adapter.layer.frozen)
                yield Shard(f"adapter {number}", adapter.start, adapter.average, split=split)

    def _own_pieces(self) -> Iterator[Shard]:
        for i, average in self.averages.items():
            start, count = owned.span(self.parameters[i], self.world)
            yield Shard(str(i), start, average.view(-1)[:count], split=split_of(self.parameters[i]))


def _whole_factors(layers: list[Adapter]) -> AbstractContextManager[Any]:
    """Within it, the factors of adapters are whole on every rank. Collective under ZeRO-3."""
    return gathered([factor for layer in layers for factor in (layer.lora_a, layer.lora_b)])


class AdapterAverage:
    """The moving average of the update that an adapter makes to its layer's weight, or this rank's part of it.

    Attributes:
        start: index of the part's first element in the flattened weight.
        average: (elements,), float32; empty if another rank keeps it.
    """

    def __init__(self, layer: Adapter, number: int, world: World) -> None:
        self.layer = layer
        self.world = world
        self.owner = number % world.dims.replicas
        weight = layer.frozen
        self.shape = full_shape(weight)
        self.start, count = owned.span(weight, world)
        self.count = count if owned.owns(weight, number, world) else 0
        self.average = self.part(layer.lora_a, layer.lora_b).to(local_shard(weight).device)

    def part(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """This rank's part of the update that two whole factors make: (elements,), float32."""
        if not self.count:
            return torch.zeros(0, device=lora_a.device)
        width = self.shape[-1]
        first, end = self.start // width, -(-(self.start + self.count) // width)
        rows = self.layer.rows_of_update(lora_a, lora_b, first, end)
        return rows.flatten()[self.start - first * width :][: self.count]

    def whole(self) -> Tensor:
        """The whole averaged update of the weight that this rank has, float32. Collective."""
        weight = self.layer.frozen
        if is_zero3(weight):
            own = torch.zeros(local_shard(weight).numel(), device=self.world.device)
            own[: self.count] = self.average
            every = own.new_empty(self.world.size * len(own))
            dist.all_gather_into_tensor(every, own)
            return every[: full_numel(weight)].view(self.shape)
        update = self.average if self.count else torch.empty(weight.numel(), device=weight.device)
        group = None if self.world.dims.tensor == 1 else replica_group()
        dist.broadcast(update, group=group, group_src=self.owner)
        return update.view(self.shape)
