"""Attention over packed sequences, each attending only to itself, as a transformers attention function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.spec.sequence_checks import OWN_ATTENTION, PACKABLE
from hpc_rlhf.train.models import cpu_kernels, structure, varlen
from hpc_rlhf.train.parallel import sequence_parallel

NAME = "hpc_rlhf_packed"


class NotPackable(RuntimeError):
    """A model does not attend within packed sequences."""


# The modules that have attended to packed sequences, within ``recording``.
_recorded: set[Any] | None = None


@contextmanager
def recording() -> Iterator[set[Any]]:
    """Within it, modules that attend to packed sequences are collected."""
    global _recorded
    _recorded = set()
    try:
        yield _recorded
    finally:
        _recorded = None


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, packed_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None, sequence_group: Any = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention with transformers' signature.

    Args:
        query: (batch, heads, queries, dim).
        key, value: (batch, key heads, keys, dim).
        attention_mask: (batch, 1, queries, keys), True where a query may attend, or numbers to add to its
            scores; None for plain causal attention.
        packed_lengths: the batch is one row of packed sequences of these lengths, and the mask is ignored.
        sliding_window: number of keys that a query of a packed sequence attends to, its own included.
        sequence_group: of the ranks that have equal shares of the packed row, in order; None if this rank has all.

    Returns:
        (batch, queries, heads, dim), and None for the weights.
    """
    if packed_lengths is not None:
        if attention_mask is not None and attention_mask.numel() > 1:
            raise NotPackable(f"{type(module).__name__} hides tokens by a mask of its own")
        if _recorded is not None:
            _recorded.add(module)
        if sequence_group is None:
            return _packed(query, key, value, packed_lengths, dropout, scaling, sliding_window), None
        heads = query.shape[1]
        query, key, value = (sequence_parallel.to_heads(each, heads, sequence_group) for each in (query, key, value))
        output = _packed(query, key, value, packed_lengths, dropout, scaling, sliding_window)
        return sequence_parallel.to_tokens(output, sequence_group), None
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        raise NotPackable(f"{type(module).__name__} got no lengths for its packed sequences")
    groups = query.shape[1] // key.shape[1]
    of_one_query = query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if groups == 1 and of_one_query and not cpu_kernels.has_amx():
        return _of_one_query(query, key, value, attention_mask, scaling), None
    if groups > 1 and query.shape[2] == 1:
        # The queries of a group become rows before their shared key: nothing is copied.
        grouped = query.view(query.shape[0], key.shape[1], groups, query.shape[3])
        out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, dropout, scale=scaling)
        return out.reshape(query.shape).transpose(1, 2), None
    key, value = _shared(key, groups), _shared(value, groups)
    causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal=causal, scale=scaling)
    return out.transpose(1, 2), None


def _of_one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The attention of a decode step, by two matrix products: torch's kernel takes 2.5 times as long on a CPU without
    AMX, and a quarter of the time with it."""
    scores = query * (scaling or query.shape[3] ** -0.5) @ key.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def _shared(heads: Tensor, groups: int) -> Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float,
    scaling: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    if varlen.supports(query, key, value, dropout):
        return varlen.attention(query, key, value, lengths, scaling, window)
    groups = query.shape[1] // key.shape[1]
    key, value = _shared(key, groups), _shared(value, groups)
    sizes = list(lengths)
    on_cpu = query.device.type == "cpu" and cpu_kernels.enabled()
    if on_cpu and window is None and not dropout and query.shape[3] == value.shape[3]:
        output: Tensor = cpu_kernels.PackedAttention.apply(query, key, value, sizes, scaling)
        return output
    outputs = []
    for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        band = _band(q.shape[2], window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, band, dropout, is_causal=band is None and q.shape[2] > 1, scale=scaling
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """A causal mask in which a query attends to ``window`` keys; None if that is all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position.unsqueeze(1) - position
    return (distance >= 0) & (distance < window)


class _GotLengths(Exception):
    """The probe was called with the lengths."""


def _passes_lengths_on(model: Any) -> bool:
    """True if an architecture passes the lengths on to its attention; tried on one layer without weights."""
    from transformers import AttentionInterface

    def probe(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Tensor | None,
        packed_lengths: tuple[int, ...] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        has_own_mask = attention_mask is not None and attention_mask.numel() > 1
        raise _GotLengths if packed_lengths and not has_own_mask else RuntimeError

    AttentionInterface.register(f"{NAME}_probe", probe)
    # The head is left out: under ZeRO-3, transformers loads what is inside a classifier, which needs a real device.
    kind, config = type(structure.body(model)), copy.deepcopy(structure.body(model).config)
    config._attn_implementation = f"{NAME}_probe"
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = 1
    try:
        with torch.device("meta"):
            ids, unused = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
            kind(config)(input_ids=ids, attention_mask=unused, position_ids=ids, use_cache=False, packed_lengths=(3, 1))
    except _GotLengths:
        return True
    except Exception:  # any kind: the architecture does not accept packed rows
        return False
    return False


def enable(model: Any) -> None:
    """Make a model accept packed rows, if its architecture allows it.

    This asks the configuration and one layer; ``agreement.verify`` asks the whole model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    own = any(getattr(model.config, field, None) for field in OWN_ATTENTION)
    attends = structure.layer_kinds(model.config) <= PACKABLE
    # Convolutions over neighbouring tokens are part of most recurrent layers.
    mixes = any(isinstance(module, nn.Conv1d) for module in model.modules())
    if own or mixes or not attends or not getattr(model, "_supports_sdpa", False) or not _passes_lengths_on(model):
        return
    model.set_attn_implementation(NAME)


def enable_again(model: Any) -> None:
    """Make a model accept packed rows again after ``disable``."""
    model.set_attn_implementation(NAME)


def is_enabled(model: Any) -> bool:
    return bool(model.config._attn_implementation == NAME)


def disable(model: Any) -> None:
    """Make a model that accepts packed rows run on padded ones."""
    if is_enabled(model):
        model.set_attn_implementation("sdpa")
