"""The order of samples: a pure function of seed and position, the same on any number of ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hpc_rlhf.train.runtime import seeds


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
