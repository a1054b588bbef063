"""The only file that uses torch's private operators: the kernels of the CPU fast path.

They make decode steps and packed attention fast on a CPU. Set the environment variable HPC_RLHF_CPU_KERNELS=0 to turn
them off, for instance when a new torch has changed one: public operators then give the same results, more slowly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

# Where a tensor that a model reads is kept: a namespace, and its name in there.
Place = tuple[dict[str, Any], str]

# Attention is fastest on multiples of this many tokens; other lengths take up to three times as long.
ATTENTION_MULTIPLE = 32

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
    """Where a model's modules, except those with the skipped ids, keep their parameters and buffers."""
    return [
        (holder, name)
        for module in model.modules()
        if id(module) not in skipped
        for holder in (module._parameters, module._buffers)
        for name in holder
    ]


def trace(run: Callable[..., Tensor], example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function of tensors as a graph of its operators, without Python between them; recorded on an example."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that a trace fixes; the caller compares its results
        graph = torch.jit.trace(run, tuple(example), check_trace=False).graph
    for cleanup in ("inline", "erase_shape_information", "constant_propagation", "cse", "dce"):
        getattr(torch._C, f"_jit_pass_{cleanup}")(graph)
    torch._C._jit_pass_custom_pattern_based_rewrite_graph(*RELU_AFTER, graph)
    traced: Callable[..., Tensor] = torch._C._create_function_from_graph("step", graph)
    return traced


# Attention


@cache
def has_amx() -> bool:
    """True if this processor has AMX, with which torch's attention in bfloat16 is fast for a single query as well."""
    return bool(torch.cpu._is_amx_tile_supported())


class PackedAttention(torch.autograd.Function):
    """Packed causal attention, whose backward pass is in float32.

    Takes (batch, heads, tokens, dim) and returns (batch, tokens, heads, dim); ``sizes`` has each sequence's tokens.
    On a CPU, half precision takes half the time of single precision forward, but up to three times backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sizes: list[int], scaling: float | None) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, normalizers = _rows_like(query, value.shape[3]), []
        for target, end in zip(out.split(sizes, 2), accumulate(sizes), strict=True):
            size = target.shape[2]
            # The tokens after a sequence pad it to a multiple: no query attends to them, and their output is discarded.
            span = slice(end - size, end + -size % ATTENTION_MULTIPLE)
            inputs = (query[:, :, span], key[:, :, span], value[:, :, span])
            output, normalizer = attend(*inputs, 0.0, True, scale=scaling)
            target.copy_(output[:, :, :size])
            normalizers.append(normalizer[:, :, :size])
        ctx.save_for_backward(query, key, value, out, *normalizers)
        ctx.sizes, ctx.scaling = sizes, scaling
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, *normalizers = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        whole = (grad.transpose(1, 2), query, key, value, out)
        parts = zip(*[tensor.to(wide).split(ctx.sizes, 2) for tensor in whole], normalizers, strict=True)
        grads = [_rows_like(tensor, tensor.shape[3]) for tensor in (query, key, value)]
        targets = zip(*[tensor.split(ctx.sizes, 2) for tensor in grads], strict=True)
        for inputs, own_targets in zip(parts, targets, strict=True):
            outputs = attend_backward(*inputs, 0.0, True, scale=ctx.scaling)
            for target, output in zip(own_targets, outputs, strict=True):
                target.copy_(output)
        return *grads, None, None


def _rows_like(heads: Tensor, dim: int) -> Tensor:
    """An empty (batch, heads, tokens, dim), with tokens outermost in memory, as the layers around it do."""
    batch, count, tokens, _ = heads.shape
    return heads.new_empty(batch, tokens, count, dim).transpose(1, 2)
