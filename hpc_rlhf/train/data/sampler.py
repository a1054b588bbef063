"""The order of samples: a pure function of seed and position, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hpc_rlhf.train.runtime import seeds

# Rounds of a Feistel network, and the multiplier of Steele and Vigna's hash (arXiv 2001.05304).
_ROUNDS, _MIX, _MASK = 6, 0xD1342543DE82EF95, 2**64 - 1


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, purpose, "order", epoch)))
    return generator.permutation(count)


def sample_at(position: int, count: int, seed: int, purpose: str) -> int:
    """The index of the sample at a position in an endless stream that is reshuffled every epoch.

    Args:
        position: 0 is the first sample of epoch 0; epoch e starts at ``e * count``.
        purpose: of the stream, so that two streams differ.
    """
    epoch, place = divmod(position, count)
    return int(_epoch_order(count, seed, purpose, epoch)[place])


def shuffled(place: int, count: int, *key: object) -> int:
    """The index at a place in a random order of ``count`` items, computed without the others.

    A Feistel network (Luby and Rackoff, 1988) permutes the smallest power of 4 that holds all items, and is applied
    again to what is no item.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    rounds = seeds.derive(*key, "order")
    while True:
        left, right = place >> half, place & low
        for number in range(_ROUNDS):
            mixed = ((right ^ rounds >> 8 * number) + number + 1) * _MIX & _MASK
            mixed = (mixed ^ mixed >> 29) * _MIX & _MASK
            left, right = right, left ^ (mixed >> 32 & low)
        place = left << half | right
        if place < count:
            return place


def blended(position: int, counts: Sequence[int]) -> tuple[int, int]:
    """The item at a position in a blend of several sources, in which each is spread evenly.

    Item j of a source with n items stands at (2j + 1) / 2n of the whole blend; of items at the same place, that of the
    first source comes first.

    Args:
        counts: items of each source.

    Returns:
        The source, and the number of its item.
    """
    total, spread = sum(counts), len(counts) // 2 + 1  # each other source moves an item by half a position at most
    for source, own in enumerate(counts):
        guess = position * own // total
        for item in range(max(0, guess - spread), min(own, guess + spread + 1)):
            if sum(_before(item, own, count, other < source) for other, count in enumerate(counts)) == position:
                return source, item
    raise IndexError(position)


def _before(item: int, own: int, count: int, earlier: bool) -> int:
    """How many of ``count`` items of a source come before an item of one with ``own`` items.

    Args:
        earlier: those at the same place do, too.
    """
    numerator = (2 * item + 1) * count - own  # item i comes before if 2i * own < this
    whole, rest = divmod(numerator, 2 * own)
    return min(count, max(0, whole + (1 if rest or earlier else 0)))


def exchanged(minibatches: list[list[int]], data_rank: int, *key: object) -> list[list[int]]:
    """Minibatches with their samples exchanged at random, for another pass over them.

    A sample keeps its place and changes its minibatch, each place in an order of its own, which depends on where the
    place is over all ranks. So every rank keeps its samples, and any number of ranks makes the same minibatches.

    Args:
        minibatches: this rank's share of each, equally many samples.
        key: what seeds the orders.
    """
    share = len(minibatches[0])
    columns = []
    for place, column in enumerate(zip(*minibatches, strict=True), data_rank * share):
        generator = np.random.Generator(np.random.PCG64(seeds.derive(*key, "place", place)))
        columns.append(generator.permutation(column).tolist())
    return [list(rows) for rows in zip(*columns, strict=True)]


def total_steps(count: int, epochs: int, per_step: int, max_steps: int | None) -> int:
    """Steps of a stage: whole steps in its epochs, at least one, at most max_steps."""
    steps = max(1, count * epochs // per_step)
    return min(steps, max_steps) if max_steps else steps
