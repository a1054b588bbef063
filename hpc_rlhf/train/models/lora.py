"""Low-rank adaptation of linear layers and experts (arXiv 2106.09685)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models import experts
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel import tensor_parallel
from hpc_rlhf.train.parallel.split_modules import SplitLinear
from hpc_rlhf.train.runtime import seeds


class Adapter:
    """The update of a frozen weight by the product of two trained factors, times ``scale``; B starts at 0.

    Attributes:
        frozen: the weight.
        on: False turns the adapter off.
        averaged_update: if given, merged weights contain this update of the frozen weight instead of the adapter's.
    """

    frozen: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    on = True
    averaged_update: Callable[[], Tensor] | None = None

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices, of each expert if the weight has several, whose product is the update of the weight."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The weight, or this rank's shard of it, with the adapter merged in float32 unless it is off."""
        if not self.on:
            return self.frozen.detach()
        if self.averaged_update is not None:
            return (self.frozen + self.averaged_update()).to(self.frozen.dtype)
        left, right = self.factors(self.lora_a.float(), self.lora_b.float())
        update = (left @ right).mul_(self.scale).view_as(self.frozen)
        return update.add_(self.frozen).to(self.frozen.dtype)

    def rows_of_update(self, lora_a: Tensor, lora_b: Tensor, first: int, end: int) -> Tensor:
        """Rows of the update, of one expert after another: (end - first, columns), float32."""
        left, right = self.factors(lora_a.float(), lora_b.float())
        if left.dim() == 2:
            return (left[first:end] @ right) * self.scale
        height = left.shape[1]
        some = slice(first // height, -(-end // height))
        rows = ((left[some] @ right[some]) * self.scale).flatten(0, 1)
        return rows[first - some.start * height :][: end - first]


class LoraLinear(Adapter, nn.Module):
    """``base(x) + alpha / rank * x A^T B^T``.

    If tensor parallelism splits the layer, it splits one factor as well: B along the outputs, or A along the inputs.
    """

    def __init__(self, base: Any, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        split_dim = tensor_parallel.split_dim(base)
        inner, outer = sizes(base)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(inner)
        start = torch.empty(rank, inner).uniform_(-bound, bound, generator=generator)
        if split_dim == 1:
            start = tensor_parallel.shard_of(base, start, 1)
        self.lora_a = nn.Parameter(start.to(base.weight.dtype))
        self.lora_b = nn.Parameter(torch.zeros(outer, rank, dtype=base.weight.dtype))
        if split_dim is not None:
            tensor_parallel.mark_split(self.lora_b if split_dim == 0 else self.lora_a, split_dim)
        base.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.base(x)
        if isinstance(self.base, SplitLinear):
            return self.base(x) + self.base.product(x, self.lora_a, self.lora_b) * self.scale
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @property
    def frozen(self) -> nn.Parameter:  # type: ignore[override]
        return self.base.weight

    @property
    def weight(self) -> Tensor:
        """The updated weight, with gradients: Mamba's layers and others multiply by it themselves."""
        if not self.on:
            return self.frozen
        left, right = self.factors(self.lora_a, self.lora_b)
        return self.frozen + (left @ right) * self.scale

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return (lora_a.T, lora_b.T) if isinstance(self.base, Conv1D) else (lora_b, lora_a)


class ExpertsAdapter(Adapter):
    """Adapts one parameter of a module of experts, each expert with factors of its own, which the module holds too."""

    def __init__(self, module: nn.Module, name: str, rank: int, alpha: float, seed: int) -> None:
        self.module, self.name = module, name
        self.scale = alpha / rank
        count, inner, outer, self.inputs_first = experts.layout(module, name)
        dtype, generator = self.frozen.dtype, torch.Generator().manual_seed(seed)
        bound, ways = 1 / math.sqrt(inner), tensor_parallel.split_ways(self.frozen)
        start = torch.empty(ways * count, rank, inner).uniform_(-bound, bound, generator=generator)
        if ways > 1:
            start = tensor_parallel.shard_of(module, start, 0)
        module.register_parameter(f"{name}_lora_a", nn.Parameter(start.to(dtype)))
        module.register_parameter(f"{name}_lora_b", nn.Parameter(torch.zeros(count, outer, rank, dtype=dtype)))
        if ways > 1:
            for factor in (self.lora_a, self.lora_b):
                tensor_parallel.mark_split(factor, 0)
        self.frozen.requires_grad = False
        experts.read_updated(module, name, self._updated)

    def _updated(self, weight: nn.Parameter) -> Any:
        return experts.UpdatedWeight(weight, *self.factors(self.lora_a, self.lora_b), self.scale) if self.on else weight

    @property
    def frozen(self) -> nn.Parameter:  # type: ignore[override]
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def lora_a(self) -> nn.Parameter:  # type: ignore[override]
        return self.module.get_parameter(f"{self.name}_lora_a")

    @property
    def lora_b(self) -> nn.Parameter:  # type: ignore[override]
        return self.module.get_parameter(f"{self.name}_lora_b")

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return (lora_a.mT, lora_b.mT) if self.inputs_first else (lora_b, lora_a)


def adapters(model: nn.Module) -> list[Adapter]:
    """A model's adapters: those of linear layers, and then those of experts. Those of tied weights come once."""
    unique: dict[int, Adapter] = {}
    for adapter in _with_tied(model):
        unique.setdefault(id(adapter.frozen), adapter)
    return list(unique.values())


def _with_tied(model: nn.Module) -> list[Adapter]:
    linear = [module for module in model.modules() if isinstance(module, LoraLinear)]
    return [*linear, *(each for module in model.modules() for each in of_experts(module).values())]


def of_experts(module: nn.Module) -> dict[str, ExpertsAdapter]:
    """The adapters of the experts that a module holds, by the names of their parameters."""
    return module.__dict__.get("lora_of_experts", {})


def sizes(base: Any) -> tuple[int, int]:
    """A linear layer's inputs, including those on other ranks, and its outputs on this rank."""
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def is_linear(layer: nn.Module) -> bool:
    """Whether a module maps inputs to outputs by its weight and bias alone, unlike a router that is a linear layer."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward) or type(layer).__name__ == "FalconLinear"


def adapt(model: nn.Module, lora: LoraSpec, seed: int) -> None:
    """Give a model's linear layers and experts, but not its output head, adapters, in place.

    A reward model's score head is newly initialized and therefore always trained in full.

    Raises:
        HpcRlhfError: the model has none of the target layers, or by default most of it would not be adapted.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (is_linear(child) or isinstance(child, SplitLinear))
        and child is not head
        and name != "score"
        and (lora.targets is None or name in lora.targets)
    ]
    of_experts = [
        (module, name)
        for module, name, public_name in experts.parameters_of_experts(model)
        if lora.experts and (lora.targets is None or public_name in lora.targets)
    ]
    if not layers and not of_experts:
        raise HpcRlhfError(
            f"the model has no linear layer called {', '.join(lora.targets)}"
            if lora.targets
            else "the model has no linear layer",
            where="lora.targets",
            hint="leave lora.targets out to adapt every linear layer",
        )
    if lora.only:
        if lora.targets is None and lora.experts:
            adapted = [child.weight for _, _, child in layers] + [module.get_parameter(n) for module, n in of_experts]
            _check_adapts_most(model, adapted, head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "score" in name.split(".")
    numbers, alpha = itertools.count(), lora.alpha or lora.rank
    of_weight: dict[int, LoraLinear] = {}
    for parent, name, child in layers:
        layer = LoraLinear(child, lora.rank, alpha, seeds.derive(seed, "lora", next(numbers)))
        first = of_weight.setdefault(id(child.weight), layer)
        layer.lora_a, layer.lora_b = first.lora_a, first.lora_b  # layers that share a weight share its update
        setattr(parent, name, layer)
    for module, name in of_experts:
        experts.check_sharding(module, name)
        adapter = ExpertsAdapter(module, name, lora.rank, alpha, seeds.derive(seed, "lora", next(numbers)))
        module.__dict__.setdefault("lora_of_experts", {})[name] = adapter


def _check_adapts_most(model: nn.Module, adapted: Sequence[Any], head: Any) -> None:
    """Refuse to train only adapters that leave out most weights of the layers."""
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    inside = sum(
        internals.full_numel(p) for p in model.parameters() if len(internals.full_shape(p)) > 1 and id(p) not in outside
    )
    share = sum(map(internals.full_numel, adapted)) / max(1, inside)
    if share < 0.5:
        raise HpcRlhfError(
            f"the linear layers, which lora adapts, hold only {share:.0%} of the weights in the model's layers",
            where="lora.only",
            hint="set lora.only: false to train the others too, leave lora out, or name layers in lora.targets",
        )


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Within it, adapters are off: a model of which only adapters are trained is its original self."""
    adapters = _with_tied(model)
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True
