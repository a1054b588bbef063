"""Fast decode steps on a CPU: weights packed for few rows, and no Python between the operators.

A small model's step takes less time for its arithmetic than Python needs to dispatch it, and oneDNN would
take as long again to pack each weight in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpc_rlhf.train.models import cpu_kernels
from hpc_rlhf.train.models.cpu_kernels import Place

# Rows that weights are packed for; other numbers work as well.
FEW_ROWS = 8

# Layers of one module that take the same input and become one matrix.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear:
    """The weights of linear layers that take the same input, packed as oneDNN wants them.

    Args:
        layers: their forward passes go through the packed weights while these are filled.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()
        for number, layer in enumerate(layers):
            vars(layer)["forward"] = self._forward_of(number, layer.forward)

    def fill(self) -> None:
        weights: list[Tensor] = [layer.weight.detach() for layer in self.layers]
        biases: list[Tensor] = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
        self.weight = cpu_kernels.pack_weight(torch.cat(weights), FEW_ROWS)
        self.bias = torch.cat(biases) if biases else None

    def clear(self) -> None:
        self.weight = self.bias = self._input = None
        self._outputs = ()

    def _forward_of(self, number: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self.weight is None:
                return plain(x)
            if self._input is not x:
                self._input, outputs = x, cpu_kernels.packed_linear(x, self.weight, self.bias)
                self._outputs = outputs.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (outputs,)
            own = self._outputs[number]
            if number == len(self.layers) - 1:
                self._input, self._outputs = None, ()
            return own

        return forward


def pack_layers(model: nn.Module) -> list[PackedLinear]:
    """Packed weights for a model's linear layers; none where packing does not help."""
    if getattr(model, "dtype", None) is not torch.bfloat16 or not cpu_kernels.packs_bfloat16():
        return []
    packed = []
    for module in list(model.modules()):
        layers = {name: layer for name, layer in module.named_children() if type(layer) is nn.Linear}
        for names in FUSED:
            group = [layers[name] for name in names if name in layers]
            kinds = {(layer.in_features, layer.bias is None) for layer in group}
            if len(group) == len(names) and len(kinds) == 1:
                packed.append(PackedLinear(group))
                layers = {name: layer for name, layer in layers.items() if name not in names}
        packed += [PackedLinear([layer]) for layer in layers.values()]
    return packed


def places(model: nn.Module, packed: Sequence[PackedLinear]) -> list[Place]:
    """Where the tensors that a forward pass reads are kept; packed weights stand in for their layers'."""
    in_packed: list[Place] = [(vars(linear), name) for linear in packed for name in ("weight", "bias")]
    skipped = {id(layer) for linear in packed for layer in linear.layers}
    everywhere = in_packed + cpu_kernels.tensor_places(model, skipped)
    return [(holder, name) for holder, name in everywhere if holder[name] is not None]


@contextmanager
def _replaced(at: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within it, other tensors are in these places."""
    before = [holder[name] for holder, name in at]
    for (holder, name), tensor in zip(at, tensors, strict=True):
        holder[name] = tensor
    try:
        yield
    finally:
        for (holder, name), original in zip(at, before, strict=True):
            holder[name] = original


def traced(forward: Callable[..., Tensor], example: Sequence[Tensor], at: Sequence[Place]) -> Callable[..., Tensor]:
    """A trace of ``forward``, as a function of its tensors and then of those in the given places.

    Args:
        example: tensors to record it with.
        at: where the other tensors that it reads are kept.
    """

    def run(*inputs: Tensor) -> Tensor:
        with _replaced(at, inputs[len(example) :]):
            return forward(*inputs[: len(example)])

    weights = [holder[name].detach() for holder, name in at]
    return cpu_kernels.trace(run, (*example, *weights))
