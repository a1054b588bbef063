"""Tensor parallelism: layers split over a group of ranks, and gathered again (arXiv 1909.08053, section 3).

Attention heads and feed-forward units are split by the plan that transformers has for an architecture. Each rank has
some of a mixture's experts, whole ones; norms and routers stay whole on every rank. ``models.vocabulary`` splits
embeddings and output heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec import tensor_checks
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel import split_modules
from hpc_rlhf.train.parallel.split_modules import ColumnLinear, LatentLinear, RowLinear, SplitExperts, SplitLinear

# For what transformers has no plan: see ``ColumnLinear`` and ``RowLinear``.
_OWN_PLANS = {
    "opt": {
        **{f"decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    }
}
# Whole on every rank, but each rank sees only its own heads.
_REPLICATED = "replicated_with_grad_allreduce"
# Transformers divides each expert; here each rank has some of them.
_EXPERTS = "moe_tp_experts"
# Whole on every rank, see ``LatentLinear``.
_LATENT = "mla_kv_a_proj"
# Replicated, also where a plan does not name them.
_NORMS_OF_HEADS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


# By the words of transformers' plans: the class of a layer, and whether it is apart.
_STYLES: dict[str, tuple[type[SplitLinear], bool]] = {
    "colwise": (ColumnLinear, False),
    "rowwise": (RowLinear, False),
    "colwise_gather_output": (ColumnLinear, True),
    "rowwise_split_input": (RowLinear, True),
}


def split_layers(model: Any, ways: int) -> Any:
    """Replace each layer of a transformers model with this rank's shard, in place. Collective.

    Args:
        model: whole and the same on all ranks.
        ways: number of neighbouring ranks that share a layer.

    Returns:
        The process group of these ranks.

    Raises:
        HpcRlhfError: the architecture is not supported, or its sizes are not divisible.
    """
    config = model.config.get_text_config()
    source = str(config.name_or_path or config.model_type)
    if problem := tensor_checks.unsplit(config.to_dict(), ways):
        raise HpcRlhfError(problem[0], where=source, hint=problem[1])
    plan = _plan(model)
    hint = "leave tensor_parallel out and use zero: 3"
    if not plan or set(plan.values()) - {_REPLICATED, _EXPERTS, _LATENT, *_STYLES}:
        raise HpcRlhfError(
            f"this version of transformers has no plan for {config.model_type} models that tensor_parallel can follow",
            where=source,
            hint=f"install a newer transformers, or {hint}",
        )
    for layer, style in plan.items():
        if style not in (_REPLICATED, _LATENT) and _size(layer, style) % ways:
            what = f"a layer of {config.model_type} models with these sizes cannot be divided among {ways} ranks"
            raise HpcRlhfError(what, where=source, hint=hint)
    _add_norms(model, plan)
    group = internals.tensor_group(ways)
    for layer, style in plan.items():
        if style == _REPLICATED:
            for parameter in layer.parameters():
                parameter.register_hook(lambda grad: split_modules.total(grad, group))
            continue
        if style == _LATENT:
            layer.__class__, layer.tensor_group, layer.keys = LatentLinear, group, config.qk_rope_head_dim
            continue
        if style == _EXPERTS:
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (SplitExperts, kind), {"__module__": kind.__module__})
            layer.num_experts //= ways
            split_rows(layer, group)
            continue
        layer.__class__, layer.is_apart = _STYLES[style]
        layer.tensor_group = group
        _shrink(layer.weight, layer.split_dim, group)
        if layer.split_dim == 0:
            layer.out_features = len(layer.weight)
            if layer.bias is not None:
                _shrink(layer.bias, 0, group)
    for module in model.modules():
        if type(module).__name__ == "OPTAttention":  # others take the number of their heads from what they get
            module.num_heads //= ways
    return group


def _size(layer: Any, style: str) -> int:
    """What is divided among the ranks: a layer's outputs or inputs, or experts."""
    size: int = layer.num_experts if style == _EXPERTS else layer.weight.shape[_STYLES[style][0].split_dim]
    return size


def divided(model: Any) -> Iterator[Any]:
    """Yield the layers and modules of experts whose weights ``split_layers`` would divide."""
    for layer, style in _plan(model).items():
        if style not in (_REPLICATED, _LATENT):
            yield layer


def _plan(model: Any) -> dict[Any, str]:
    """The layers that an architecture's plan names, with their styles."""
    config = model.config.get_text_config()
    plan = _OWN_PLANS.get(config.model_type) or config.base_model_tp_plan or {}
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()}
    named = model.base_model.named_modules()
    return {layer: style for name, layer in named for pattern, style in patterns.items() if pattern.fullmatch(name)}


def _add_norms(model: Any, plan: dict[Any, str]) -> None:
    """Add to a plan the norms of heads that it splits."""
    for attention in model.modules():
        if plan.get(getattr(attention, "q_proj", None)) == "colwise":
            for name in _NORMS_OF_HEADS:
                if isinstance(norm := getattr(attention, name, None), nn.Module):
                    plan.setdefault(norm, _REPLICATED)


def split_rows(layer: Any, group: Any) -> None:
    """Leave a layer this rank's rows, or experts, of its own parameters, in place; one that it shares is split once.
    What the layer says of its size stays that of the whole."""
    layer.tensor_group, layer.split_dim = group, 0
    for parameter in layer.parameters(recurse=False):
        if split_dim(parameter) is None:
            _shrink(parameter, 0, group)


def _shrink(parameter: Any, dim: int, group: Any) -> None:
    parameter.data = split_modules.own(parameter.data, group, dim).clone(memory_format=torch.contiguous_format)
    parameter.split_ways, parameter.split_place = dist.get_world_size(group), dist.get_rank(group)
    mark_split(parameter, dim)


def mark_split(parameter: Any, dim: int) -> None:
    """Note that this rank holds only a shard of a parameter, split along a dimension."""
    internals.mark_split(parameter)
    parameter.split_dim = dim


def split_dim(layer: Any) -> int | None:
    """The dimension that a layer's weight, or a parameter, is split along: 0 outputs, 1 inputs; None if it is whole."""
    return getattr(layer, "split_dim", None)


def place(parameter: Any) -> int:
    """This rank's index among the shards of a split parameter."""
    return int(parameter.split_place)


def split_ways(parameter: Any) -> int:
    """The number of shards; 1 if the parameter is whole."""
    return int(getattr(parameter, "split_ways", 1))


def split_of(parameter: Any) -> tuple[int, tuple[int, ...]] | None:
    """The dimension along which a parameter is split, and the shape of this rank's shard; None if it is whole."""
    dim = split_dim(parameter)
    return None if dim is None else (dim, tuple(parameter.shape))


def gather(layer: Any, name: str, shard: Tensor) -> Tensor:
    """A layer's whole weight or bias, given its name and this rank's shard. Collective if the layer is split."""
    dim = split_dim(layer)
    if dim is None or (dim == 1 and name == "bias"):
        return shard
    group = layer.tensor_group
    ranks = dist.get_world_size(group)
    whole = shard.new_empty(ranks * shard.shape[0], *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    return whole if dim == 0 else whole.view(ranks, *shard.shape).transpose(0, 1).flatten(1)


def shard_of(layer: Any, tensor: Tensor, dim: int) -> Tensor:
    """This rank's shard of a whole tensor, split along a dimension over the layer's group."""
    return split_modules.own(tensor, layer.tensor_group, dim).clone()
