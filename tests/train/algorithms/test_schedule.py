"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math

import pytest

from hpc_rlhf.train.algorithms.schedule import factor, warmup_steps


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_rises_linearly_from_above_zero(name: str) -> None:
    rises = [factor(name, step, 4, 100) for step in range(5)]
    assert rises == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_peak_rate(name: str) -> None:
    assert factor(name, 0, 0, 10) == 1.0


def test_decay_in_closed_form() -> None:
    for step in range(10, 51):
        progress = (step - 10) / 40
        assert factor("linear", step, 10, 50) == pytest.approx(1 - progress)
        assert factor("cosine", step, 10, 50) == pytest.approx((1 + math.cos(math.pi * progress)) / 2)
        assert factor("constant", step, 10, 50) == 1.0


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_rate_stays_at_its_end(name: str, end: float) -> None:
    assert factor(name, 50, 10, 50) == pytest.approx(end)
    assert factor(name, 500, 10, 50) == pytest.approx(end)


def test_a_warm_up_longer_than_the_stage_is_shortened() -> None:
    factors = [factor("cosine", step, 100, 4) for step in range(4)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.1, 100, 10), (0.03, 119, 4), (0.1, 3, 0), (0, 50, 0), (1, 50, 1), (20, 50, 20), (100, 50, 50), (0.9, 1, 1)],
)
def test_a_warm_up_is_a_fraction_or_a_number_of_steps_and_ends_with_the_stage(
    warmup: float, total: int, steps: int
) -> None:
    assert warmup_steps(warmup, total) == steps
