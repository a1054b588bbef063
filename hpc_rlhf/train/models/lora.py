"""Low-rank adaptation of linear layers (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel import tensor_parallel
from hpc_rlhf.train.runtime import seeds


class LoraLinear(nn.Module):
    """``base(x) + alpha / rank * x A^T B^T`` with the base weight frozen; B starts at 0.

    If tensor parallelism splits the layer, it splits one factor as well: B along the outputs, or A along the inputs.

    Attributes:
        on: False turns the adapter off.
        averaged_update: if given, merged weights contain this update of the base weight instead of the adapter's.
    """

    def __init__(self, base: Any, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.on = True
        self.averaged_update: Callable[[], Tensor] | None = None
        split_dim = tensor_parallel.split_dim(base)
        self.between_factors = None if split_dim is None else internals.between_factors(base)
        inner, outer = sizes(base)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(inner)
        start = torch.empty(rank, inner).uniform_(-bound, bound, generator=generator)
        if split_dim == 1:
            start = tensor_parallel.shard_of(base, start, 1)
        self.lora_a = nn.Parameter(start.to(base.weight.dtype))
        self.lora_b = nn.Parameter(torch.zeros(outer, rank, dtype=base.weight.dtype))
        if split_dim is not None:
            internals.mark_split(self.lora_b if split_dim == 0 else self.lora_a)
        base.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.base(x)
        inner = F.linear(x, self.lora_a)
        if self.between_factors:
            inner = self.between_factors(inner)
        return self.base(x) + F.linear(inner, self.lora_b) * self.scale

    def merged_weight(self) -> Tensor:
        """The base weight, or this rank's shard of it, with the adapter merged in float32 unless it is off."""
        if not self.on:
            return self.base.weight.detach()
        if self.averaged_update is not None:
            update = self.averaged_update()
        else:
            left, right = self.factors(self.lora_a, self.lora_b)
            update = (left @ right) * self.scale
        return (self.base.weight.float() + update).to(self.base.weight.dtype)

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices in float32 whose product, times the scale, is the update of the base weight."""
        a, b = lora_a.float(), lora_b.float()
        return (a.T, b.T) if isinstance(self.base, Conv1D) else (b, a)


def sizes(base: Any) -> tuple[int, int]:
    """A linear layer's inputs, including those on other ranks, and its outputs on this rank."""
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    outer, inner = base.weight.shape
    return inner * (tensor_parallel.split_ways(base.weight) if base.split_dim == 1 else 1), outer


def adapt(model: nn.Module, lora: LoraSpec, seed: int) -> None:
    """Wrap a model's linear layers, except its output head, in adapters, in place.

    A reward model's score head is newly initialized and therefore always trained in full.

    Raises:
        HpcRlhfError: the model has none of the target layers.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (isinstance(child, nn.Linear | Conv1D) or tensor_parallel.split_dim(child) is not None)
        and child is not head
        and name != "score"
        and (lora.targets is None or name in lora.targets)
    ]
    if not layers:
        raise HpcRlhfError(
            f"the model has no linear layer called {', '.join(lora.targets or ())}",
            where="lora.targets",
            hint="leave lora.targets out to adapt every linear layer",
        )
    if lora.only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "score" in name.split(".")
    for number, (parent, name, child) in enumerate(layers):
        adapter = LoraLinear(child, lora.rank, lora.alpha or lora.rank, seeds.derive(seed, "lora", number))
        setattr(parent, name, adapter)


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Within it, adapters are off: a model of which only adapters are trained is its original self."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True
