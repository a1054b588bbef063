"""Attention over sequences laid end to end, each attending to itself only, as a transformers attention."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "hpc_rlhf_packed"

# Tokens of a multiple of which a CPU's attention is fastest: odd ones take up to three times as long.
EVEN = 32

# Attention that scaled_dot_product_attention does not compute.
OWN_ATTENTION = ("attn_logit_softcapping", "logit_soft_cap", "alibi")


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, packed_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention in transformers' interface.

    Args:
        query: (batch, heads, queries, dim).
        key, value: (batch, key heads, keys, dim).
        attention_mask: (batch, 1, queries, keys), True where a query may look, or what is added to its scores; None
            for plain causal attention.
        packed_lengths: the batch is one row of sequences of these lengths, and the mask is of no account.
        sliding_window: keys that a query sees, itself included, where sequences are packed.

    Returns:
        (batch, queries, heads, dim), and no weights.
    """
    if packed_lengths is not None:
        return _packed(query, key, value, packed_lengths, dropout, scaling, sliding_window), None
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        raise RuntimeError(f"{type(module).__name__} was not told how long the packed sequences are")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.shape[2] == 1:
        # Queries of a group stand as rows before their shared key: nothing is copied.
        grouped = query.view(query.shape[0], key.shape[1], groups, query.shape[3])
        out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, dropout, scale=scaling)
        return out.reshape(query.shape).transpose(1, 2), None
    key, value = _shared(key, groups), _shared(value, groups)
    causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2), None


def _shared(heads: Tensor, groups: int) -> Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float,
    scaling: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = _shared(key, groups), _shared(value, groups)
    sizes = list(lengths)
    if query.device.type == "cpu" and window is None and not dropout and query.shape[3] == value.shape[3]:
        mixed: Tensor = _CpuAttention.apply(query, key, value, sizes, scaling)
        return mixed
    parts = []
    for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        band = _band(q.shape[2], window, q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, band, dropout, is_causal=band is None and q.shape[2] > 1, scale=scaling
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1)


class _CpuAttention(torch.autograd.Function):
    """Packed causal attention whose backward pass is in float32: on a CPU, half precision takes half the time of single
    forward, but up to three times backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sizes: list[int], scaling: float | None
    ) -> Tensor:
        # Each sequence's part is written to where it stays.
        out, normalizers = _rows_like(query, value.shape[3]), []
        for place, end in zip(out.split(sizes, 2), accumulate(sizes), strict=True):
            size = place.shape[2]
            # What follows a sequence fills it up: it is not looked at, and what it sees is not kept.
            whole = slice(end - size, end + -size % EVEN)
            part, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, whole], key[:, :, whole], value[:, :, whole], 0.0, True, scale=scaling
            )
            place.copy_(part[:, :, :size])
            normalizers.append(normalizer[:, :, :size])
        ctx.save_for_backward(query, key, value, out, *normalizers)
        ctx.sizes, ctx.scaling = sizes, scaling
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, out, *normalizers = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        whole = (grad.transpose(1, 2), query, key, value, out)
        parts = zip(*[tensor.to(wide).split(ctx.sizes, 2) for tensor in whole], normalizers, strict=True)
        grads = [_rows_like(tensor, tensor.shape[3]) for tensor in (query, key, value)]
        places = zip(*[tensor.split(ctx.sizes, 2) for tensor in grads], strict=True)
        for part, targets in zip(parts, places, strict=True):
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *part, 0.0, True, scale=ctx.scaling
            )
            for target, own in zip(targets, made, strict=True):
                target.copy_(own)
        return *grads, None, None


def _rows_like(heads: Tensor, dim: int) -> Tensor:
    """Room for (batch, heads, tokens, dim), laid out as rows of tokens, which is how the layers around take it."""
    batch, count, tokens, _ = heads.shape
    return heads.new_empty(batch, tokens, count, dim).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """A causal mask in which a query sees ``window`` keys; None where that is all of them."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    back = place.unsqueeze(1) - place
    return (back >= 0) & (back < window)


class _Heard(Exception):
    """Attention was told the lengths."""


def _probe(*_: Any, packed_lengths: tuple[int, ...] | None = None, **__: Any) -> tuple[Tensor, None]:
    raise _Heard if packed_lengths else RuntimeError


def _hands_lengths_on(model: Any) -> bool:
    """Whether an architecture hands the lengths on to its attention; tried out on a layer without weights."""
    from transformers import AttentionInterface

    AttentionInterface.register(f"{NAME}_probe", _probe)
    config = copy.deepcopy(model.config)
    config._attn_implementation = f"{NAME}_probe"
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = 1
    try:
        with torch.device("meta"):
            ids, unused = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
            body = type(model)(config).base_model
            body(
                input_ids=ids, attention_mask=unused, position_ids=ids, use_cache=False, packed_lengths=(3, 1)
            )
    except _Heard:
        return True
    except Exception:  # of whatever kind: it is not one of those that take packed rows
        return False
    return False


def enable(model: Any) -> None:
    """Let a model take packed rows, if its architecture allows it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    own = any(getattr(model.config, field, None) for field in OWN_ATTENTION)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if own or not getattr(model, "_supports_sdpa", False) or not _hands_lengths_on(model):
        return
    model.set_attn_implementation(NAME)
