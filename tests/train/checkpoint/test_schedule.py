"""When checkpoints are due, and when an attempt has to stop to save in time."""

from __future__ import annotations

import math

import pytest

from hpc_rlhf.train.checkpoint import schedule
from hpc_rlhf.train.checkpoint.schedule import SLACK, CheckpointSchedule, Deadline, daly, time_used
from tests.train.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(schedule, "time", made)
    return made


def lost(seconds: float, cost: float, mttf: float) -> float:
    """Share of the time spent on saving and on repeating work lost to failures (Young's model)."""
    return cost / seconds + seconds / (2 * mttf)


@pytest.mark.parametrize(("cost", "mttf"), [(1.0, 86400.0), (30.0, 86400.0), (60.0, 7200.0)])
def test_auto_minimizes_the_lost_time(cost: float, mttf: float) -> None:
    best = daly(cost, mttf)
    for other in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        assert lost(best, cost, mttf) < lost(other, cost, mttf)
    assert daly(0.0, 86400.0) > 60, "a cost too small to measure does not lead to constant saving"


def test_checkpoints_by_steps_come_between_steps() -> None:
    schedule_ = CheckpointSchedule(steps=10)
    assert [step for step in range(31) if schedule_.due(step, 0)] == [10, 20, 30]
    assert not schedule_.due(10, 3)


def test_checkpoints_by_time_count_from_the_last_save(clock: Clock) -> None:
    schedule_ = CheckpointSchedule(seconds=600, last=clock.now)
    clock.now += 599
    assert not schedule_.due(5, 0)
    clock.now += 2
    assert schedule_.due(5, 2)
    schedule_.saved(1.0)
    assert not schedule_.due(6, 0)


def test_auto_adapts_to_the_cost_of_a_save(clock: Clock) -> None:
    schedule_ = CheckpointSchedule(mttf=86400, cost=1.0, last=clock.now)
    schedule_.saved(50.0)
    clock.now += daly(50, 86400) - 1
    assert not schedule_.due(9, 0)
    clock.now += 2
    assert schedule_.due(9, 0)


def test_an_attempt_stops_while_there_is_time_to_save(clock: Clock) -> None:
    """With steps of 100 s and saves of 20 s, it stops when another step no longer fits."""
    deadline = Deadline(end=clock.now + 1000, save=20.0)
    stopped = []
    for step in range(10):
        if deadline.reached_at(0):
            stopped.append(step)
        clock.now += 100
    assert stopped[0] == 9, "after 900 s, a step and a save no longer fit"
    assert not Deadline().reached_at(0)


def test_each_part_of_a_step_has_its_own_duration(clock: Clock) -> None:
    """A rollout takes 300 s and an update 10 s: updates still fit where a rollout does not."""
    deadline = Deadline(end=clock.now + 700)
    for part, seconds in ((0, 300), (1, 10), (2, 10), (0, 300), (1, 10), (2, 10)):
        assert not deadline.reached_at(part), part
        clock.now += seconds
    assert deadline.reached_at(0)


def test_the_time_of_a_save_does_not_count_as_step_time(clock: Clock) -> None:
    deadline = Deadline(end=clock.now + 1000)
    deadline.reached_at(0)
    clock.now += 400
    deadline.restart_timer()
    clock.now += 10
    deadline.reached_at(0)
    assert deadline.longest == {0: 10}


def test_a_passed_deadline_stops_anywhere(clock: Clock) -> None:
    deadline = Deadline(end=clock.now + 100, save=30)
    assert not deadline.passed
    clock.now += 70 - SLACK
    assert deadline.passed
    assert not Deadline(end=math.inf, save=30).passed


@pytest.mark.parametrize("wrong_by", [-90000, -3600, 0, 3600, 90000])
def test_the_used_time_does_not_depend_on_a_wrong_clock(wrong_by: int) -> None:
    started, script = 50_000.0, 600.0  # the script began after a prolog of 40 s
    used = time_used(started, started + 640 + wrong_by, script)
    assert used == (640 if wrong_by == 0 else 600)


def test_without_the_age_of_the_script_the_clock_counts() -> None:
    assert time_used(50_000.0, 50_640.0, None) == 640


def test_a_clock_that_is_reset_does_not_move_the_deadline(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline(end=clock.now + 1000)
    monkeypatch.setattr(clock, "time", lambda: clock.now + 3600)
    assert not deadline.passed
