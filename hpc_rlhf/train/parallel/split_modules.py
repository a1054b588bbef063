"""Modules that a group of ranks shares, and the sums and joins between them (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, group: Any) -> Tensor:
        return total(outputs, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own(grad, ctx.group), None


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum over a group, without a gradient."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def own(tensor: Tensor, group: Any, dim: int = -1) -> Tensor:
    """This rank's part of a whole tensor."""
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def sum_gradients(inputs: Tensor, group: Any) -> Tensor:
    """The inputs of what each rank of a group computes a part of; their gradients are summed over the group."""
    summed: Tensor = _SumGradients.apply(inputs, group)
    return summed


def sum_outputs(outputs: Tensor, group: Any) -> Tensor:
    """The sum over a group of what each of its ranks has computed a part of."""
    total: Tensor = _SumOutputs.apply(outputs, group)
    return total


def join(part: Tensor, group: Any) -> Tensor:
    """Concatenate the ranks' equal parts along the last dimension, in rank order."""
    whole: Tensor = _Join.apply(part, group)
    return whole


class SplitLinear(nn.Linear):
    """This rank's shard of a linear layer.

    Attributes:
        split_dim: dimension that the weight is split along.
        tensor_group: process group of the ranks that share the layer.
        is_apart: its neighbours are not split: it joins its outputs, or takes its share of whole inputs.
    """

    split_dim: int
    tensor_group: Any
    is_apart: bool

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product(inputs, self.weight, bias=self.bias)

    def product(self, inputs: Tensor, *weights: Tensor, bias: Tensor | None = None) -> Tensor:
        """What a linear layer computes with one weight, or with several in place of their product.

        Args:
            weights: the factor next to this layer's split dimension is split as its weight is; the others are whole.
        """
        raise NotImplementedError


class ColumnLinear(SplitLinear):
    """Split along its outputs, of which the next layer takes a share, too."""

    split_dim = 0

    def product(self, inputs: Tensor, *weights: Tensor, bias: Tensor | None = None) -> Tensor:
        *whole, split = weights
        for weight in whole:
            inputs = F.linear(inputs, weight)
        outputs = F.linear(sum_gradients(inputs, self.tensor_group), split, bias)
        return join(outputs, self.tensor_group) if self.is_apart else outputs


class RowLinear(SplitLinear):
    """Split along its inputs, which are the outputs of the layer before; its own are summed over the group."""

    split_dim = 1

    def product(self, inputs: Tensor, *weights: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.is_apart:
            inputs = own(sum_gradients(inputs, self.tensor_group), self.tensor_group)
        split, *whole = weights
        outputs = sum_outputs(F.linear(inputs, split), self.tensor_group)
        for weight in whole:
            outputs = F.linear(outputs, weight)
        return outputs if bias is None else outputs + bias


class LatentLinear(SplitLinear):
    """Whole on every rank, before split layers of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Of its outputs, the last are keys that each rank uses for its own heads, and the others inputs of a split layer.

    Attributes:
        keys: how many of the outputs are keys.
    """

    keys: int

    def product(self, inputs: Tensor, *weights: Tensor, bias: Tensor | None = None) -> Tensor:
        *first, last = weights
        for weight in first:
            inputs = F.linear(inputs, weight)
        outputs = F.linear(inputs, last, bias)
        latent, keys = outputs.split([outputs.shape[-1] - self.keys, self.keys], dim=-1)
        return torch.cat((latent, sum_gradients(keys, self.tensor_group)), dim=-1)


class SplitExperts(nn.Module):
    """A mix-in for modules of experts, of which each rank has some; their outputs are summed over the group.

    Attributes:
        tensor_group: process group of the ranks that share the experts.
        num_experts: on this rank.
    """

    tensor_group: Any
    num_experts: int
    split_dim = 0

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Shapes: hidden (tokens, width); chosen, of all experts, and their weights (tokens, experts per token)."""
        group, count = self.tensor_group, self.num_experts
        number = chosen - dist.get_rank(group) * count
        is_own = (number >= 0) & (number < count)
        weights = sum_gradients(weights, group).masked_fill(~is_own, 0)
        tokens, places = torch.where(is_own)
        if not len(tokens):  # so that the parameters get a gradient, of 0
            tokens = places = tokens.new_zeros(1)
        number, weight = (each[tokens, places].unsqueeze(1) for each in (number.clamp(0, count - 1), weights))
        outputs = super().forward(sum_gradients(hidden, group)[tokens], number, weight)
        return sum_outputs(torch.zeros_like(hidden).index_add(0, tokens, outputs), group)
