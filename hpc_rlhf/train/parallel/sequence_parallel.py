"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group share the tokens of a packed row.

Every rank of a group gets the whole row, passes its share of the tokens through the layers, and returns what was
computed from all of them. Attention needs all tokens: before it, the ranks exchange their tokens for a share of the
heads, and afterwards the reverse.

Each rank computes the same loss from the outputs, but its gradients are those of its own tokens. ``total`` scales them
so that their mean over the ranks, which is what DeepSpeed takes, is the gradient of the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share(tensor: Tensor, group: Any) -> Tensor:
    """This rank's share of the elements along the first dimension, which the group divides."""
    return tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def to_heads(heads: Tensor, query_heads: int, group: Any) -> Tensor:
    """A share of the heads of all tokens, from all heads of this rank's tokens. Collective in the group.

    Args:
        heads: (1, heads, own tokens, dim): queries, or keys or values, of which the same head may serve several ranks.
        query_heads: heads of the queries, which the group divides.

    Returns:
        (1, own heads, tokens, dim): those that belong to this rank's share of the query heads.
    """
    ranks, count = dist.get_world_size(group), heads.shape[1]
    assert query_heads % ranks == 0
    return _exchange(heads[0].repeat_interleave(math.lcm(count, ranks) // count, dim=0), group).unsqueeze(0)


def to_tokens(outputs: Tensor, group: Any) -> Tensor:
    """All heads of this rank's tokens, (1, own tokens, heads, dim), from (1, tokens, own heads, dim). Collective in the
    group."""
    return _exchange(outputs[0], group).unsqueeze(0)


def _exchange(tensor: Tensor, group: Any) -> Tensor:
    """Split the first dimension over the ranks, and join their second ones: (a, b, …) to (a / ranks, b * ranks, …)."""
    parts = tensor.unflatten(0, (dist.get_world_size(group), -1)).contiguous()
    received: Tensor = _AllToAll.apply(parts, group)
    return received.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        received: Tensor = _AllToAll.apply(grad.contiguous(), ctx.group)
        return received, None


def own(tokens: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Those of some tokens that are in this rank's share of the row.

    Args:
        tokens: (n,), int64, indices in the row.
        count: tokens of a share.

    Returns:
        Which of ``tokens`` they are, and their indices in the share: (own n,), int64, each.
    """
    places = tokens - dist.get_rank(group) * count
    which = ((places >= 0) & (places < count)).nonzero().squeeze(1)
    return which, places[which]


def joined(values: Tensor, which: Tensor, count: int, group: Any) -> Tensor:
    """All ranks' values, (count,), from those of this rank, (own n,), and their indices, ``which``. Collective in the
    group."""
    return total(values.new_zeros(count).index_copy(0, which, values), group)


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the group, on each of its ranks, from which each computes the same loss. Collective in it."""
    result: Tensor = _Total.apply(tensor, group)
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        result = tensor.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.ranks, None  # the sum of the gradients of all ranks, which are equal
