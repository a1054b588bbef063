"""Intervals against tables, against the equations they solve, and against how often they hold the truth."""

from __future__ import annotations

import math
import random

import pytest

from hpc_rlhf.train.algorithms import intervals


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)],
)
def test_students_t_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert intervals.t_quantile(0.95, freedom) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (3, 7), (7, 7), (12.5, 40), (997, 1000)])
def test_wilsons_bounds_are_those_at_which_the_sample_is_just_not_surprising(
    successes: float, count: int
) -> None:
    """(rate - p)² = z² p (1 - p) / n at both of them."""
    found = intervals.share(successes, count)
    for bound in (found.low, found.high):
        distance = (successes / count - bound) ** 2
        assert distance == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-7)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_a_mean_is_held_by_its_interval_as_often_as_promised() -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(2000):
        found = intervals.mean([chance.gauss(3.0, 2.0) for _ in range(5)])
        held += found.low <= 3.0 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_pairs_narrow_the_interval_of_a_difference() -> None:
    base = [float(i) for i in range(50)]
    gain = intervals.mean([0.5 + 0.1 * (-1) ** i for i in range(50)])
    assert gain.estimate == pytest.approx(0.5)
    assert gain.high - gain.low < 0.1 < intervals.mean(base).high - intervals.mean(base).low


def test_what_says_little_bounds_little() -> None:
    alone = intervals.mean([2.0])
    assert (alone.estimate, alone.low, alone.high) == (2.0, -math.inf, math.inf)
    same = intervals.mean([2.0, 2.0, 2.0])
    assert (same.low, same.high) == (2.0, 2.0)
    with pytest.raises(ValueError, match="samples"):
        intervals.share(0, 0)
    with pytest.raises(ValueError, match="values"):
        intervals.mean([])
