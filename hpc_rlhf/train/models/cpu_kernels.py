"""The only file that uses torch's private operators: the kernels of the CPU fast path.

They make decode steps and packed attention fast on a CPU. Set the environment variable HPC_RLHF_CPU_KERNELS=0 to turn
them off, for instance when a new torch has changed one: public operators then give the same results, more slowly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Where a tensor that a model reads is kept: a namespace, and its name in there.
Place = tuple[dict[str, Any], str]

# Fuses a ReLU into the matrix product before it, which gives the same bits.
RELU_AFTER = (
    """
    graph(%x, %weight, %bias, %none, %scalars, %algorithm):
      %linear = mkldnn::_linear_pointwise(%x, %weight, %bias, %none, %scalars, %algorithm)
      %output = aten::relu(%linear)
      return (%output)""",
    """
    graph(%x, %weight, %bias, %none, %scalars, %algorithm):
      %relu : str = prim::Constant[value="relu"]()
      %output = mkldnn::_linear_pointwise(%x, %weight, %bias, %relu, %scalars, %algorithm)
      return (%output)""",
)


def enabled() -> bool:
    """False if the user has turned the kernels off."""
    return os.environ.get("HPC_RLHF_CPU_KERNELS", "1") != "0"


# Matrix products in bfloat16 for a few rows


def packs_bfloat16() -> bool:
    """True if this processor and this torch have the packed bfloat16 matrix product, and it is turned on."""
    mkldnn = torch.backends.mkldnn.is_available()
    return enabled() and mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """A weight in the layout that oneDNN wants for inputs of about that many rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    packed_linear = torch.jit.script(_packed_linear)  # a trace does not accept the empty list


# Traces


def tensor_places(model: nn.Module, skipped: set[int]) -> list[Place]:
    """Where a model's modules keep their parameters and buffers.

    Args:
        skipped: ids of modules to leave out.
    """
    return [
        (holder, name)
        for module in model.modules()
        if id(module) not in skipped
        for holder in (module._parameters, module._buffers)
        for name in holder
    ]


def trace(run: Callable[..., Tensor], example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function of tensors as a graph of its operators, without Python between them.

    Args:
        example: tensors to call it with while its operators are recorded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that a trace fixes; the caller compares its results
        graph = torch.jit.trace(run, tuple(example), check_trace=False).graph
    for cleanup in ("inline", "erase_shape_information", "constant_propagation", "cse", "dce"):
        getattr(torch._C, f"_jit_pass_{cleanup}")(graph)
    torch._C._jit_pass_custom_pattern_based_rewrite_graph(*RELU_AFTER, graph)
    traced: Callable[..., Tensor] = torch._C._create_function_from_graph("step", graph)
    return traced


# Attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Causal attention over (batch, heads, tokens, dim), and the normalizers for its backward pass."""
    output, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scaling
    )
    return output, normalizers


def causal_attention_backward(tensors: Sequence[Tensor], scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        tensors: the output's gradient, query, key, value, output and normalizers.
    """
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads: tuple[Tensor, Tensor, Tensor] = backward(*tensors, 0.0, True, scale=scaling)
    return grads
