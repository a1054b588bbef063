"""Control messages between ranks, as JSON, which unlike a pickle cannot run code of its sender."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in rank order, after a round trip through JSON: tuples become lists. Collective.

    Args:
        group: a process group for CPU tensors.
    """
    own = _to_bytes(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    return [_to_value(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]


def broadcast(value: Any, group: Any) -> Any:
    """Rank 0's value on every rank, as ``gather`` returns values. Collective."""
    own = _to_bytes(value)
    length = torch.tensor([len(own)])
    dist.broadcast(length, src=0, group=group)
    text = own if dist.get_rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, src=0, group=group)
    return _to_value(text)


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _to_value(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))
