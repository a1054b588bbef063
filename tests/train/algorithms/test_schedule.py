"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math

import pytest

from hpc_rlhf.train.algorithms.schedule import factor, phase_steps


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_from_above_zero(name: str) -> None:
    rises = [factor(name, step, 4, 100) for step in range(5)]
    assert rises == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
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


def test_wsd_stays_at_the_peak_and_falls_linearly_in_the_last_steps() -> None:
    factors = [factor("wsd", step, 2, 10, decay=4) for step in range(11)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert [factor("wsd", step, 8, 10, decay=4) for step in (8, 9, 10)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_final_rate_is_a_fraction_of_the_peak(name: str) -> None:
    ends = [factor(name, step, 10, 50, decay=20, final=0.1) for step in (10, 50, 60)]
    assert ends == pytest.approx([1.0, 0.1, 0.1])
    middle = factor(name, 40, 10, 50, decay=20, final=0.1)
    assert middle == pytest.approx(0.1 + 0.9 * factor(name, 40, 10, 50, decay=20))


def test_a_warm_up_longer_than_the_stage_is_shortened() -> None:
    factors = [factor("cosine", step, 100, 4) for step in range(4)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.1, 100, 10), (0.03, 119, 4), (0.1, 3, 0), (0, 50, 0), (1, 50, 1), (20, 50, 20), (100, 50, 50), (0.9, 1, 1)],
)
def test_a_phase_is_a_fraction_or_a_number_of_steps_and_no_longer_than_the_stage(
    warmup: float, total: int, steps: int
) -> None:
    assert phase_steps(warmup, total) == steps
