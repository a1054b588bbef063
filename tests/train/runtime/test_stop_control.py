"""Where code learns of a stop: work goes on, is cancelled, or the attempt ends."""

from __future__ import annotations

import pytest

from hpc_rlhf.train.runtime.consensus import Consensus
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag
from hpc_rlhf.train.runtime.world import World


@pytest.fixture
def stop(world: World) -> StopControl:
    control = StopControl(StopFlag(), Consensus(world))
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
