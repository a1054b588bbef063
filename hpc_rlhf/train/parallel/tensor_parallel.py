"""Tensor parallelism: layers split over a group of ranks by DeepSpeed's AutoTP, and gathered again.

Attention heads and feed-forward units are split; norms stay whole on every rank. ``models.vocabulary`` splits
embeddings and output heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.parallel import deepspeed_internals as internals

# Architectures whose layers have the names below; tests compare each with the unsplit model.
ARCHITECTURES = ("llama", "mistral", "opt", "qwen2", "qwen3")
# Split along their outputs.
COLUMNS = "q_proj|k_proj|v_proj|gate_proj|up_proj|fc1"
# Split along their inputs, which are the outputs of the layer before; their outputs are summed over the group.
ROWS = "o_proj|out_proj|down_proj|fc2"
# Whole on every rank, but each rank sees only its own heads: their gradients are summed over the group.
REPLICATED = "q_norm|k_norm"


def split_layers(model: Any, ways: int) -> None:
    """Replace every layer of a transformers model by this rank's shard of it, in place. Collective.

    Args:
        model: whole and the same on all ranks.
        ways: number of neighbouring ranks that share a layer.

    Raises:
        HpcRlhfError: the architecture is not supported, or its sizes are not divisible.
    """
    _check(model.config, ways)
    internals.split_layers(model, model.config, ways, COLUMNS, ROWS, REPLICATED)


def split_rows(layer: Any, ways: int) -> None:
    """Leave a layer this rank's rows of its weight and bias, in place; a weight that it shares is split once."""
    layer.mp_group, layer.split_dim = internals.tensor_group(), 0
    for parameter in layer.parameters(recurse=False):
        if not internals.is_split(parameter):
            parameter.data = shard_of(layer, parameter.data, 0)
            parameter.split_ways = ways
            mark_split(parameter, 0)


def mark_split(parameter: Any, dim: int) -> None:
    """Note that this rank holds only a shard of a parameter, split along a dimension."""
    internals.mark_split(parameter)
    parameter.split_dim = dim


def split_of(parameter: Any) -> tuple[int, tuple[int, ...]] | None:
    """The dimension that a parameter is split along, and this rank's shape of it; None if it is whole."""
    dim = split_dim(parameter)
    return None if dim is None else (dim, tuple(parameter.shape))


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, group: Any) -> Tensor:
        total = outputs.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_gradients(inputs: Tensor, group: Any) -> Tensor:
    """The inputs of what each rank of a group computes a part of; their gradients are summed over the group."""
    summed: Tensor = _SumGradients.apply(inputs, group)
    return summed


def sum_outputs(outputs: Tensor, group: Any) -> Tensor:
    """The sum over a group of what each of its ranks has computed a part of."""
    total: Tensor = _SumOutputs.apply(outputs, group)
    return total


def between_factors(layer: Any) -> Callable[[Tensor], Tensor]:
    """What a low-rank update of a split layer applies to the product with its first factor."""
    return partial(sum_gradients if split_dim(layer) == 0 else sum_outputs, group=internals.layer_group(layer))


def _check(config: Any, tensor_parallel: int) -> None:
    where = config.name_or_path or config.model_type
    if config.model_type not in ARCHITECTURES:
        raise HpcRlhfError(
            f"tensor_parallel does not support {config.model_type} models",
            where=where,
            hint=f"leave it out and use zero: 3, which shards any model; supported: {', '.join(ARCHITECTURES)}",
        )
    heads = config.num_attention_heads
    sizes = {
        "attention heads": heads,
        "key and value heads": getattr(config, "num_key_value_heads", None) or heads,
        "feed-forward units": getattr(config, "intermediate_size", None) or config.ffn_dim,
    }
    for name, count in sizes.items():
        if count % tensor_parallel:
            raise HpcRlhfError(
                f"the model's {count} {name} cannot be divided among tensor_parallel: {tensor_parallel} ranks",
                where=where,
                hint="set tensor_parallel to a divisor of it, or leave it out and use zero: 3",
            )


def split_dim(layer: Any) -> int | None:
    """The dimension that a layer's weight, or a parameter, is split along: 0 outputs, 1 inputs; None if it is whole."""
    return getattr(layer, "split_dim", None)


def split_ways(parameter: Any) -> int:
    """The number of ranks that a parameter is split over."""
    return int(getattr(parameter, "split_ways", 1))


def gather(layer: Any, name: str, shard: Tensor) -> Tensor:
    """A layer's whole weight or bias, given its name and this rank's shard. Collective if the layer is split."""
    dim = split_dim(layer)
    if dim is None or (dim == 1 and name == "bias"):
        return shard
    group = internals.layer_group(layer)
    ranks = dist.get_world_size(group)
    whole = shard.new_empty(ranks * shard.shape[0], *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    return whole if dim == 0 else whole.view(ranks, *shard.shape).transpose(0, 1).flatten(1)


def shard_of(layer: Any, tensor: Tensor, dim: int) -> Tensor:
    """This rank's shard of a whole tensor, split along a dimension over the layer's group."""
    group = internals.layer_group(layer)
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].clone()
