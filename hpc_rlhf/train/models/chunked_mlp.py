"""MLPs that take long passes part by part, and compute each part again in the backward pass.

An MLP maps every token on its own, so outputs and gradients are those of the whole pass; but only its input is kept,
and the activations inside exist for one part at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.sizes import MLP_TOKENS
from hpc_rlhf.train.models import experts, structure


def enable(model: Any) -> None:
    """Chunk a model's MLPs, in place.

    Raises:
        HpcRlhfError: its layers have no such MLPs.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers = structure.layers(structure.body(model))
    mlps = find(layers[1]) if layers else []
    if not mlps:
        what = f"the MLPs of {model.config.model_type} models cannot take a pass part by part"
        raise HpcRlhfError(what, where="chunked_mlp", hint="leave chunked_mlp out")
    for mlp in mlps:
        mlp.forward = partial(_in_parts, mlp.forward)
        # Ranks have different numbers of parts, and ZeRO-3 gathers weights on all ranks together: once per pass.
        set_z3_leaf_module(mlp, True)


def find(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The MLP of every layer; empty unless each has one that maps hidden states alone, without experts."""
    mlps = [getattr(layer, "mlp", None) for layer in layers]
    return [mlp for mlp in mlps if mlp is not None] if all(map(_is_plain, mlps)) else []


def _is_plain(mlp: Any) -> bool:
    if not isinstance(mlp, nn.Module) or any(True for _ in experts.parameters_of_experts(mlp)):
        return False
    return len(inspect.signature(mlp.forward).parameters) == 1


def _in_parts(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The outputs of an MLP for hidden states of shape (..., tokens, width)."""
    tokens = hidden.shape[:-1].numel()
    if not torch.is_grad_enabled() or tokens <= MLP_TOKENS:
        return forward(hidden)
    parts = hidden.reshape(1, tokens, -1).split(MLP_TOKENS, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1).view(hidden.shape)
