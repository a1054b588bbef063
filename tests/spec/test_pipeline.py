"""Layers are divided so that the largest stage is as small as it can be."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from hpc_rlhf.spec.pipeline import stage_bounds

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=7)


@given(SIZES, st.integers(0, 200), st.integers(0, 200), st.data())
def test_no_other_division_has_a_smaller_largest_stage(
    layers: list[int], before: int, after: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(layers)))

    def largest(bounds: list[int]) -> int:
        sizes = [sum(layers[start:stop]) for start, stop in pairwise(bounds)]
        sizes[0] += before
        sizes[-1] += after
        return max(sizes)

    bounds = stage_bounds(layers, before, after, stages)
    every = [[0, *inner, len(layers)] for inner in combinations(range(1, len(layers)), stages - 1)]
    assert bounds in every
    assert largest(bounds) == min(map(largest, every))
