"""What one rank is told, all know, and work that waits for nobody ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.runtime import watchdog
from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, Interrupted, StopFlag
from hpc_rlhf.train.runtime.watchdog import Pulse, Watch
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.stages import tiny_spec


def test_a_rank_hears_what_another_was_told(world: World, request: pytest.FixtureRequest) -> None:
    """Two watches of one store stand for two ranks."""
    told, other = StopFlag(), StopFlag()
    first, second = (Watch(flag, request.node.name) for flag in (told, other))
    first.look()
    second.look()
    assert other.code == 0
    told.heard = 1
    first.look()
    second.look()
    assert REASON_OF_CODE[other.code] == "time limit"
    told.heard = 2
    first.look()
    second.look()
    assert REASON_OF_CODE[other.code] == "preempted", "a weightier one comes after it"
    later = StopFlag()
    Watch(later, "the next attempt").look()
    assert later.code == 0


def test_the_end_of_the_time_is_a_stop_for_all(world: World, request: pytest.FixtureRequest) -> None:
    main, other = StopFlag(), StopFlag()
    Watch(main, request.node.name, lambda: True).look()
    Watch(other, request.node.name).look()
    assert REASON_OF_CODE[main.code] == REASON_OF_CODE[other.code] == "time limit"


def test_the_thread_hears_while_the_rank_is_busy(world: World, request: pytest.FixtureRequest) -> None:
    told, other = StopFlag(), StopFlag()
    told.heard = 2
    with Watch(told, request.node.name), Watch(other, request.node.name) as second:
        for _ in range(600):
            if other.code or second._over.wait(0.05):
                break
    assert other.code == 2


def test_preparing_data_ends_and_leaves_nothing_that_counts(tmp_path: Path, world: World) -> None:
    spec, tokenizer = tiny_spec(tmp_path / "run", 1, sft={}), tiny.tokenizer()
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        prepare(spec, "sft", tokenizer, tmp_path, world, lambda: next(asked) > 50)
    assert next(asked) == 52
    assert len(prepare(spec, "sft", tokenizer, tmp_path, world).train) > 100


class Ended(Exception):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that stands still unless it is moved, and ranks that raise where they would end."""

    def end(code: int) -> None:
        raise Ended(code)

    made = SimpleNamespace(now=1000.0, sleep=lambda _: None)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(watchdog, "time", made)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    return made


def test_a_rank_that_stops_moving_ends_all_and_says_so_once(
    world: World, clock: SimpleNamespace, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    pulses = Pulse(), Pulse()
    ranks = [Watch(StopFlag(), request.node.name, pulse=pulse, hangs=said.append) for pulse in pulses]
    for seconds in (0, 30, 400):
        clock.now += seconds
        for pulse in pulses:
            pulse.beat()
    clock.now += 3900
    for rank in ranks:
        rank.look()
    pulses[1].beat()
    clock.now += 200
    with pytest.raises(Ended):
        ranks[0].look()
    with pytest.raises(Ended):  # it moves, but the other does not
        ranks[1].look()
    assert said == ["rank 0 has not moved for 4100 s; the longest that it took before is 400 s"]
    assert capfd.readouterr().err.count("test_a_rank_that_stops_moving") == 2, "both say where they are"


def test_short_steps_do_not_make_for_haste_nor_does_loading(clock: SimpleNamespace) -> None:
    pulse = Pulse()
    clock.now += 10**6
    assert pulse.silence is None, "nothing is known before the first move"
    for _ in range(3):
        pulse.beat()
        clock.now += 1
    clock.now += watchdog.LEAST - 2
    assert pulse.silence is None
    clock.now += 2
    assert pulse.silence is not None
