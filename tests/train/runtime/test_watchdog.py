"""A stop spreads to all ranks, ends work that waits for no other rank, and a hanging attempt ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.runtime import watchdog
from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StopFlag, WorkCancelled
from hpc_rlhf.train.runtime.watchdog import Heartbeat, Watchdog
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.stages import tiny_spec


def test_a_stop_spreads_to_other_ranks(world: World, request: pytest.FixtureRequest) -> None:
    """Two watchdogs of one store act as two ranks."""
    flag, other = StopFlag(), StopFlag()
    first, second = (Watchdog(each, request.node.name) for each in (flag, other))
    first.poll()
    second.poll()
    assert other.code == 0
    flag.received = 1
    first.poll()
    second.poll()
    assert REASON_OF_CODE[other.code] == "time limit"
    flag.received = 2
    first.poll()
    second.poll()
    assert REASON_OF_CODE[other.code] == "preempted", "a reason of higher priority follows"
    later = StopFlag()
    Watchdog(later, "the next attempt").poll()
    assert later.code == 0


def test_the_end_of_the_time_stops_all_ranks(world: World, request: pytest.FixtureRequest) -> None:
    main, other = StopFlag(), StopFlag()
    Watchdog(main, request.node.name, lambda: True).poll()
    Watchdog(other, request.node.name).poll()
    assert REASON_OF_CODE[main.code] == REASON_OF_CODE[other.code] == "time limit"


def test_the_thread_polls_while_the_rank_is_busy(world: World, request: pytest.FixtureRequest) -> None:
    flag, other = StopFlag(), StopFlag()
    flag.received = 2
    with Watchdog(flag, request.node.name), Watchdog(other, request.node.name) as second:
        for _ in range(600):
            if other.code or second._finished.wait(0.05):
                break
    assert other.code == 2


def test_interrupted_data_preparation_leaves_no_partial_data(tmp_path: Path, world: World) -> None:
    spec, tokenizer = tiny_spec(tmp_path / "run", 1, sft={}), tiny.tokenizer()
    polls = iter(range(1000))
    with pytest.raises(WorkCancelled):
        prepare(spec, "sft", tokenizer, tmp_path, world, lambda: next(polls) > 50)
    assert next(polls) == 52
    assert len(prepare(spec, "sft", tokenizer, tmp_path, world).train) > 100


class Ended(Exception):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that only the test advances; ranks raise Ended instead of exiting."""

    def end(code: int) -> None:
        raise Ended(code)

    made = SimpleNamespace(now=1000.0, sleep=lambda _: None)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(watchdog, "time", made)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    return made


def test_a_hanging_rank_ends_all_ranks_and_is_reported_once(
    world: World, clock: SimpleNamespace, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    messages: list[str] = []
    heartbeats = Heartbeat(), Heartbeat()
    ranks = [
        Watchdog(StopFlag(), request.node.name, heartbeat=heartbeat, on_hang=messages.append)
        for heartbeat in heartbeats
    ]
    for seconds in (0, 30, 400):
        clock.now += seconds
        for heartbeat in heartbeats:
            heartbeat.beat()
    clock.now += 3900
    for rank in ranks:
        rank.poll()
    heartbeats[1].beat()
    clock.now += 200
    with pytest.raises(Ended):
        ranks[0].poll()
    with pytest.raises(Ended):  # it makes progress, but the other does not
        ranks[1].poll()
    assert messages == ["rank 0 has made no progress for 4100 s; its longest pause before was 400 s"]
    assert capfd.readouterr().err.count("test_a_hanging_rank") == 2, "both write their stacks"


def test_neither_short_steps_nor_loading_count_as_a_hang(clock: SimpleNamespace) -> None:
    heartbeat = Heartbeat()
    clock.now += 10**6
    assert heartbeat.overdue is None, "loading may take long"
    for _ in range(3):
        heartbeat.beat()
        clock.now += 1
    clock.now += watchdog.MIN_HANG - 2
    assert heartbeat.overdue is None
    clock.now += 2
    assert heartbeat.overdue is not None
