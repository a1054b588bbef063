"""What one rank is told, all know, and work that waits for nobody ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.preemption import REASON_OF_CODE, Interrupted, StopFlag
from hpc_rlhf.train.watch import Watch
from hpc_rlhf.train.world import World
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
    with Watch(told, request.node.name), Watch(other, request.node.name) as watch:
        for _ in range(600):
            if other.code or watch._over.wait(0.05):
                break
    assert other.code == 2


def test_preparing_data_ends_and_leaves_nothing_that_counts(tmp_path: Path, world: World) -> None:
    spec, tokenizer = tiny_spec(tmp_path / "run", 1, sft={}), tiny.tokenizer()
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        prepare(spec, "sft", tokenizer, tmp_path, world, lambda: next(asked) > 50)
    assert next(asked) == 52
    assert len(prepare(spec, "sft", tokenizer, tmp_path, world).train) > 100
