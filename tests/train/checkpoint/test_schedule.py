"""When to save, and when there is no time left for anything else."""

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
    """Share of the time that goes into saving and into doing again what failures lost (Young's model)."""
    return cost / seconds + seconds / (2 * mttf)


@pytest.mark.parametrize(("cost", "mttf"), [(1.0, 86400.0), (30.0, 86400.0), (60.0, 7200.0)])
def test_auto_is_where_the_least_is_lost(cost: float, mttf: float) -> None:
    best = daly(cost, mttf)
    for other in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        assert lost(best, cost, mttf) < lost(other, cost, mttf)
    assert daly(0.0, 86400.0) > 60, "a cost too small to be measured does not make for saving all the time"


def test_steps_are_whole_steps() -> None:
    every = CheckpointSchedule(steps=10)
    assert [step for step in range(31) if every.due(step, 0)] == [10, 20, 30]
    assert not every.due(10, 3)


def test_times_count_from_the_last_save(clock: Clock) -> None:
    every = CheckpointSchedule(seconds=600, last=clock.now)
    clock.now += 599
    assert not every.due(5, 0)
    clock.now += 2
    assert every.due(5, 2)
    every.saved(1.0)
    assert not every.due(6, 0)


def test_auto_follows_what_a_save_costs(clock: Clock) -> None:
    every = CheckpointSchedule(mttf=86400, cost=1.0, last=clock.now)
    every.saved(50.0)
    clock.now += daly(50, 86400) - 1
    assert not every.due(9, 0)
    clock.now += 2
    assert every.due(9, 0)


def test_an_attempt_stops_while_there_is_time_to_save(clock: Clock) -> None:
    """Steps of 100 s, and saves of 20 s: it stops when another step would be one too many."""
    deadline = Deadline(end=clock.now + 1000, save=20.0)
    stopped = []
    for step in range(10):
        if deadline.reached_at(0):
            stopped.append(step)
        clock.now += 100
    assert stopped[0] == 9, "900 s are gone, and a step and a save no longer fit"
    assert not Deadline().reached_at(0)


def test_each_part_of_a_step_has_its_own_length(clock: Clock) -> None:
    """A rollout takes 300 s and an update 10 s: updates still fit where a rollout does not."""
    deadline = Deadline(end=clock.now + 700)
    for part, seconds in ((0, 300), (1, 10), (2, 10), (0, 300), (1, 10), (2, 10)):
        assert not deadline.reached_at(part), part
        clock.now += seconds
    assert deadline.reached_at(0)


def test_the_time_of_a_save_is_not_that_of_a_step(clock: Clock) -> None:
    deadline = Deadline(end=clock.now + 1000)
    deadline.reached_at(0)
    clock.now += 400
    deadline.restart_timer()
    clock.now += 10
    deadline.reached_at(0)
    assert deadline.longest == {0: 10}


def test_out_of_time_anywhere(clock: Clock) -> None:
    deadline = Deadline(end=clock.now + 100, save=30)
    assert not deadline.passed
    clock.now += 70 - SLACK
    assert deadline.passed
    assert not Deadline(end=math.inf, save=30).passed


@pytest.mark.parametrize("wrong_by", [-90000, -3600, 0, 3600, 90000])
def test_a_node_whose_clock_is_wrong_knows_how_much_time_is_used(wrong_by: int) -> None:
    started, script = 50_000.0, 600.0  # the script began after a prolog of 40 s
    used = time_used(started, started + 640 + wrong_by, script)
    assert used == (640 if wrong_by == 0 else 600)


def test_without_the_scripts_word_the_clock_has_to_be_believed() -> None:
    assert time_used(50_000.0, 50_640.0, None) == 640


def test_a_clock_that_is_set_in_the_meantime_ends_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = Deadline(end=clock.now + 1000)
    monkeypatch.setattr(clock, "time", lambda: clock.now + 3600)
    assert not deadline.passed
