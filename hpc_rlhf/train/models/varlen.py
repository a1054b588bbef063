"""Packed attention on GPUs by torch's flash attention for sequences of varying lengths: one kernel for all of a row."""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn

    ACCEPTED = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # torch 2.9 and earlier
    ACCEPTED = frozenset()

# Larger heads have no backward pass on some GPUs.
LARGEST_HEAD = 192


@lru_cache(None)
def runs_on(device: torch.device) -> bool:
    """True if this torch has the kernel, with windows, for a device."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and "window_size" in ACCEPTED and torch.cuda.get_device_capability(device) >= (8, 0)


def supports(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """True if the kernel computes attention over these: (1, heads, tokens, dim), with or without gradients."""
    dim = query.shape[3]
    return (
        runs_on(query.device)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and dim == value.shape[3] <= LARGEST_HEAD
        and dim % 8 == 0
        and (query.shape[1] == key.shape[1] or "enable_gqa" in ACCEPTED)
        and all(heads.stride(3) == 1 for heads in (query, key, value))
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within each of the packed sequences.

    Args:
        query: (1, heads, tokens, dim).
        key, value: (1, key heads, tokens, dim).
        lengths: of the sequences, which make up the tokens.
        window: number of keys that a query attends to, its own included; None for all before it.

    Returns:
        (1, tokens, heads, dim).
    """
    longest, ends = max(lengths), _ends(lengths, query.device)
    before = -1 if window is None or window >= longest else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    output: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(before, 0), **grouped)
    return torch.unsqueeze(output, 0)


@lru_cache(maxsize=4)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,), int32: where each sequence begins, and the end of the last. Every layer needs the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
