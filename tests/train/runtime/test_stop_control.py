"""Where code learns of a stop: work goes on, is cancelled, or the attempt ends. Ranks agree at a bounded cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from hpc_rlhf.train.runtime import stop_control
from hpc_rlhf.train.runtime.stop_control import Consensus, StopControl
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag
from hpc_rlhf.train.runtime.world import World
from tests.train.clock import Clock


@pytest.fixture
def stop(world: World) -> StopControl:
    control = StopControl(StopFlag(), world)
    control.save = lambda reason: 7
    return control


def test_without_a_stop_nothing_happens(stop: StopControl) -> None:
    with stop.cancellable():
        assert not stop.should_stop()
        stop.check("work")
    stop.check()
    assert stop.check_with([3, 0]) == [3, 0]


def test_a_stop_saves_and_ends_the_attempt(stop: StopControl) -> None:
    stop.flag.received = 2
    assert stop.should_stop()
    with pytest.raises(StageStopped) as stopped:
        stop.check("work")
    assert (stopped.value.reason, stopped.value.step) == ("preempted", 7)
    with pytest.raises(StageStopped):
        stop.check_with([1])


def test_cancellable_work_is_cancelled_before_the_attempt_ends(stop: StopControl) -> None:
    """An inner piece of work that is cancelled cancels the outer one."""
    log = []

    def work() -> None:
        with stop.cancellable():
            with stop.cancellable():
                stop.flag.received = 1
                stop.check("work")
                log.append("inner work continued")
            log.append("outer work continued")

    with pytest.raises(StageStopped):
        work()
    assert log == []


def test_an_error_in_cancellable_work_is_raised(stop: StopControl) -> None:
    with pytest.raises(ValueError, match="wrong"), stop.cancellable():
        raise ValueError("wrong")
    stop.flag.received = 1
    with pytest.raises(StageStopped):
        stop.check()


def test_only_pieces_of_work_start_the_heartbeat(stop: StopControl) -> None:
    stop.check()
    assert stop.heartbeat.last is None, "loading may take long"
    stop.check("work")
    assert stop.heartbeat.last is not None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stop_control, "time", made)
    return made


def rounds(consensus: Consensus, clock: Clock, pieces: int, seconds: float, kind: str = "work") -> list[int]:
    """The pieces of work that had a round before them."""
    found = []
    for piece in range(pieces):
        if consensus.agree_between(kind, [piece]) is not None:
            found.append(piece)
        clock.now += seconds
    return found


def test_between_short_pieces_most_rounds_are_skipped(world: World, clock: Clock) -> None:
    found = rounds(Consensus(world), clock, 1000, 0.01)
    assert found[:6] == [0, 1, 3, 7, 15, 31], "at first the interval doubles"
    gaps = {later - earlier for earlier, later in pairwise(found[6:])}
    assert gaps <= {24, 25}, "then it is a quarter of a second"


def test_expensive_rounds_are_rarer(world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Consensus.agree

    def slow(self: Consensus, numbers: Sequence[int]) -> list[int]:
        clock.now += 0.01
        return ask(self, numbers)

    monkeypatch.setattr(Consensus, "agree", slow)
    found = rounds(Consensus(world), clock, 1000, 0.05)
    gaps = [later - earlier for earlier, later in pairwise(found[8:])]
    assert min(gaps) >= 18, "rounds take a hundredth of the time"
    assert max(gaps) <= 21


def test_long_pieces_always_have_a_round(world: World, clock: Clock) -> None:
    assert rounds(Consensus(world), clock, 20, 1.0) == list(range(20))


def test_each_kind_of_work_has_its_own_pace(world: World, clock: Clock) -> None:
    busy = Consensus(world)
    rounds(busy, clock, 1000, 0.001)
    assert rounds(busy, clock, 3, 30.0, "long") == [0, 1, 2]


def test_the_largest_of_each_number_is_returned(world: World) -> None:
    assert Consensus(world).agree([3, 0, 7]) == [3, 0, 7]
    assert Consensus(world).agree_between("work", [2, 1]) == [2, 1]
