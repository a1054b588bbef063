"""What makes a decode step fast on a CPU: matrices laid out for few rows, and no Python between the operations.

A small model's step takes less time for its arithmetic than Python does to come to it, and a matrix that oneDNN has to
lay out anew in every step takes as long again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Rows that matrices are laid out for; others may be multiplied, too.
FEW_ROWS = 8

# Layers inside one module that are given the same input: one matrix.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# A rectifier after a matrix, and in it, which gives the same bits.
RELU_AFTER = (
    """
    graph(%x, %weight, %bias, %none, %scalars, %algorithm):
      %linear = mkldnn::_linear_pointwise(%x, %weight, %bias, %none, %scalars, %algorithm)
      %made = aten::relu(%linear)
      return (%made)""",
    """
    graph(%x, %weight, %bias, %none, %scalars, %algorithm):
      %relu : str = prim::Constant[value="relu"]()
      %made = mkldnn::_linear_pointwise(%x, %weight, %bias, %relu, %scalars, %algorithm)
      return (%made)""",
)

# Where a tensor stands that a model reads: what holds it by which name.
Place = tuple[dict[str, Any], str]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _linear = torch.jit.script(_linear)  # a trace takes no empty list


class Matrix:
    """The weights of linear layers that are given the same input, as oneDNN wants them.

    Args:
        layers: whose forward passes it makes while it is filled.
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
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), FEW_ROWS)
        self.bias = torch.cat(biases) if biases else None

    def drop(self) -> None:
        self.weight = self.bias = self._input = None
        self._outputs = ()

    def _forward_of(self, number: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self.weight is None:
                return plain(x)
            if self._input is not x:
                self._input, made = x, _linear(x, self.weight, self.bias)
                self._outputs = made.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (made,)
            made = self._outputs[number]
            if number == len(self.layers) - 1:
                self._input, self._outputs = None, ()
            return made

        return forward


def matrices(model: nn.Module) -> list[Matrix]:
    """The matrices of a model's linear layers, where laying them out helps."""
    if not (
        getattr(model, "dtype", None) is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return []
    made = []
    for module in list(model.modules()):
        layers = {name: layer for name, layer in module.named_children() if type(layer) is nn.Linear}
        for names in TOGETHER:
            group = [layers[name] for name in names if name in layers]
            alike = {(layer.in_features, layer.bias is None) for layer in group}
            if len(group) == len(names) and len(alike) == 1:
                made.append(Matrix(group))
                layers = {name: layer for name, layer in layers.items() if name not in names}
        made += [Matrix([layer]) for layer in layers.values()]
    return made


def places(model: nn.Module, packed: Sequence[Matrix]) -> list[Place]:
    """Where all tensors stand that a model's forward pass reads, but for the weights that the matrices have."""
    found: list[Place] = [(vars(matrix), name) for matrix in packed for name in ("weight", "bias")]
    inside = {id(layer) for matrix in packed for layer in matrix.layers}
    for module in model.modules():
        if id(module) not in inside:
            found += [(module._parameters, name) for name in module._parameters]
            found += [(module._buffers, name) for name in module._buffers]
    return [(holder, name) for holder, name in found if holder[name] is not None]


@contextmanager
def _given(at: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within it, other tensors stand in some places."""
    before = [holder[name] for holder, name in at]
    for (holder, name), tensor in zip(at, tensors, strict=True):
        holder[name] = tensor
    try:
        yield
    finally:
        for (holder, name), tensor in zip(at, before, strict=True):
            holder[name] = tensor


def traced(
    forward: Callable[..., Tensor], example: Sequence[Tensor], at: Sequence[Place]
) -> Callable[..., Tensor]:
    """A function as its operations alone.

    Args:
        forward: of tensors.
        example: what it is called with, to see what it does.
        at: where the tensors stand that it reads besides.

    Returns:
        A function of the same tensors as ``forward`` and of those that stand in these places.
    """

    def run(*inputs: Tensor) -> Tensor:
        with _given(at, inputs[len(example) :]):
            return forward(*inputs[: len(example)])

    held = [holder[name].detach() for holder, name in at]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace fixes, which its user tries out
        graph = torch.jit.trace(run, (*example, *held), check_trace=False).graph
    for tidy in ("inline", "erase_shape_information", "constant_propagation", "cse", "dce"):
        getattr(torch._C, f"_jit_pass_{tidy}")(graph)
    torch._C._jit_pass_custom_pattern_based_rewrite_graph(*RELU_AFTER, graph)
    made: Callable[..., Tensor] = torch._C._create_function_from_graph("step", graph)
    return made
