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


def total_steps(count: int, epochs: int, per_step: int, max_steps: int | None) -> int:
    """Steps of a stage: whole steps in its epochs, at least one, at most max_steps."""
    steps = max(1, count * epochs // per_step)
    return min(steps, max_steps) if max_steps else steps
