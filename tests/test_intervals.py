"""Intervals compared with tables, their equations, and their coverage."""

from __future__ import annotations

import math
import random

import pytest

from hpc_rlhf import intervals


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)],
)
def test_students_t_matches_tables(freedom: int, expected: float) -> None:
    assert intervals.t_quantile(0.95, freedom) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (3, 7), (7, 7), (12.5, 40), (997, 1000)])
def test_wilsons_bounds_solve_their_equation(successes: float, count: int) -> None:
    """(rate - p)² = z² p (1 - p) / n at both of them."""
    interval = intervals.share(successes, count)
    for bound in (interval.low, interval.high):
        distance = (successes / count - bound) ** 2
        assert distance == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-7)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_the_interval_of_a_mean_has_its_coverage() -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(2000):
        interval = intervals.mean([chance.gauss(3.0, 2.0) for _ in range(5)])
        held += interval.low <= 3.0 <= interval.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_pairs_narrow_the_interval_of_a_difference() -> None:
    base = [float(i) for i in range(50)]
    gain = intervals.mean([0.5 + 0.1 * (-1) ** i for i in range(50)])
    assert gain.estimate == pytest.approx(0.5)
    assert gain.high - gain.low < 0.1 < intervals.mean(base).high - intervals.mean(base).low


def test_few_samples_give_wide_intervals() -> None:
    alone = intervals.mean([2.0])
    assert (alone.estimate, alone.low, alone.high) == (2.0, -math.inf, math.inf)
    same = intervals.mean([2.0, 2.0, 2.0])
    assert (same.low, same.high) == (2.0, 2.0)
    with pytest.raises(ValueError, match="samples"):
        intervals.share(0, 0)
    with pytest.raises(ValueError, match="values"):
        intervals.mean([])
