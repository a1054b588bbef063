"""How a pipeline divides a model's layers over its stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def stage_bounds(layers: Sequence[int], before: int, after: int, stages: int) -> list[int]:
    """The division of layers into contiguous stages of which the largest has the fewest parameters.

    Args:
        layers: parameters of each layer, at least as many layers as stages.
        before: parameters that the first stage has besides: the embeddings.
        after: parameters that the last stage has besides: the final norm and the output head.

    Returns:
        ``stages + 1`` numbers: stage i has the layers from the i-th number up to the next; at least one.
    """
    count, ends = len(layers), [0, *accumulate(layers)]

    def size(start: int, stop: int) -> int:
        return ends[stop] - ends[start] + before * (start == 0) + after * (stop == count)

    # For the first layers, divided into one stage, two and so on: the size of the largest stage, and the bounds.
    best = {stop: (size(0, stop), [0, stop]) for stop in range(1, count + 1)}
    for _ in range(stages - 1):
        best = {
            stop: min(
                (max(largest, size(start, stop)), [*bounds, stop])
                for start, (largest, bounds) in best.items()
                if start < stop
            )
            for stop in range(min(best) + 1, count + 1)
        }
    return best[count][1]
