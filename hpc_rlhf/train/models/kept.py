"""A model's weights at an earlier step, kept beside those in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models import owned
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.score_head import ScoreHead
from hpc_rlhf.train.parallel.deepspeed_internals import local_shard
from hpc_rlhf.train.parallel.tensor_parallel import split_of
from hpc_rlhf.train.runtime.world import World


class KeptWeights:
    """An exact copy of the trained parameters in host memory, of which each rank keeps what it owns; see ``owned``.

    Score heads in half precision have a float32 weight beside the parameter,
    which counts as one more.

    Args:
        ema: the model's moving average, of which a copy is kept as well.

    Attributes:
        facts: JSON about the copied weights; None while there is no copy.
    """

    def __init__(self, model: nn.Module, world: World, ema: Ema | None = None) -> None:
        self.world, self.ema = world, ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.heads = [m for m in model.modules() if isinstance(m, ScoreHead) and m.weight.dtype != torch.float32]
        self.copies: dict[int, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.facts: dict[str, Any] | None = None

    def keep(self, facts: dict[str, Any]) -> None:
        """Copy the current weights. Not collective."""
        self.copies = {i: local_shard(tensor).to("cpu", copy=True) for i, tensor in self._own()}
        self.averages = self._current_averages()
        self.facts = facts

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Temporarily give the model the copied weights. Collective."""
        averages = self._current_averages()
        with owned.replaced(dict(enumerate(self._tensors())), self.copies, self.world):
            self._set_averages(self.averages)
            try:
                yield
            finally:
                self._set_averages(averages)

    def save(self, snapshot: Snapshot, name: str) -> None:
        """Add the copy, if there is one, to a snapshot's folder, for any number of ranks to resume from. Collective."""
        if self.facts is not None:
            shards.write(snapshot, name, self._pieces(), self.facts, self.world)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, if it wrote anything."""
        if folder.exists():
            self.copies = {i: torch.empty_like(local_shard(tensor), device="cpu") for i, tensor in self._own()}
            self.averages = self._current_averages()
            shards.read(folder, list(self._pieces()), self.world)
            self.facts = shards.read_facts(folder)

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters, *(head.exact for head in self.heads if head.exact is not None)]

    def _own(self) -> Iterator[tuple[int, Tensor]]:
        for i, tensor in enumerate(self._tensors()):
            if owned.owns(tensor, i, self.world):
                yield i, tensor

    def _pieces(self) -> Iterator[Shard]:
        tensors = self._tensors()
        for i, copy in self.copies.items():
            start, count = owned.span(tensors[i], self.world)
            yield Shard(str(i), start, copy.view(-1)[:count], split=split_of(tensors[i]))
        for shard in self.ema.pieces() if self.ema else ():
            yield replace(shard, key=f"average {shard.key}", tensor=self.averages[shard.key])

    def _current_averages(self) -> dict[str, Tensor]:
        return {s.key: s.tensor.to("cpu", copy=True) for s in self.ema.pieces()} if self.ema else {}

    def _set_averages(self, averages: dict[str, Tensor]) -> None:
        for shard in self.ema.pieces() if self.ema else ():
            shard.tensor.copy_(averages[shard.key])
