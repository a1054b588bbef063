"""Packed sequences of different lengths, and the plan of their ranks and micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Packed token sequences: ``ids`` (tokens,), int64, one sequence after the other, and the tokens of each."""

    ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device | None = None) -> Ragged:
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int64)
        return cls(torch.from_numpy(flat).to(device or torch.device("cpu")), tuple(len(row) for row in rows))

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> list[list[int]]:
        return [row.tolist() for row in self.ids.split(list(self.lengths))] if self.lengths else []

    def select(self, rows: Sequence[int]) -> Ragged:
        """Some of the sequences, in this order."""
        parts = self.ids.split(list(self.lengths))
        return Ragged(torch.cat([parts[row] for row in rows]), tuple(self.lengths[row] for row in rows))

    def tail(self, sizes: Sequence[int]) -> Tensor:
        """Indices into ``ids`` of the last tokens of each sequence, as many as its size: (sum of sizes,), int64."""
        ends = accumulate(self.lengths)
        spans = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return torch.from_numpy(np.concatenate(spans)).to(self.ids.device)


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Position of each token in its own sequence: (tokens,), int64."""
    return torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)


def pad(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of a packed tensor (sum of lengths, …), padded with 0 on the right: (batch, longest, …)."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)


def mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(batch, longest), bool; True on the real tokens of rows padded on the right."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def pack_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The sequences of each micro-batch, the longest first, by first-fit-decreasing bin packing.

    ``budget`` is the tokens of a micro-batch; a longer sequence gets one of its own.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for index in _longest_first(lengths):
        place = next((b for b, room in enumerate(free) if room >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(budget)
        bins[place].append(index)
        free[place] -= lengths[index]
    return bins


def split_to_count(bins: list[list[int]], count: int) -> list[list[int]]:
    """Split micro-batches until there are ``count``; append empty ones if none can be split any more."""
    bins = list(bins)
    while len(bins) < count:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        if largest is None or len(bins[largest]) < 2:
            bins.append([])
            continue
        whole = bins[largest]
        bins[largest] = whole[::2]
        bins.append(whole[1::2])
    return bins


def balance_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Distribute sequences over ranks: the longest remaining one goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in _longest_first(lengths):
        tokens, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], rank))
    return shares


def plan_step(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Which rank processes which sequences of an optimizer step, in which micro-batch.

    It is a pure function, so every rank knows the whole plan. Every rank gets the same number of
    micro-batches, because passes are collective under ZeRO; empty ones only keep ranks in sync.

    Args:
        lengths: tokens of each sequence of the step.
        budget: tokens of a micro-batch.

    Returns:
        For each rank, for each micro-batch, indices into lengths. Together each index once.
    """
    shares = balance_ranks(lengths, ranks)
    packed = [
        [[share[i] for i in rows] for rows in pack_micro_batches([lengths[i] for i in share], budget)]
        for share in shares
    ]
    count = max(len(bins) for bins in packed)
    return [split_to_count(bins, count) for bins in packed]
