"""Ranks agree at a bounded cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from hpc_rlhf.train.runtime import consensus
from hpc_rlhf.train.runtime.consensus import Consensus
from hpc_rlhf.train.runtime.world import World
from tests.train.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(consensus, "time", made)
    return made


def rounds(consensus_: Consensus, clock: Clock, pieces: int, seconds: float, kind: str = "work") -> list[int]:
    """The pieces of work before which there was a round."""
    found = []
    for piece in range(pieces):
        if consensus_.agree_between(kind, [piece]) is not None:
            found.append(piece)
        clock.now += seconds
    return found


def test_between_short_pieces_most_rounds_are_left_out(world: World, clock: Clock) -> None:
    found = rounds(Consensus(world), clock, 1000, 0.01)
    assert found[:6] == [0, 1, 3, 7, 15, 31], "at first their number doubles"
    gaps = {later - earlier for earlier, later in pairwise(found[6:])}
    assert gaps <= {24, 25}, "then a quarter of a second goes by"


def test_where_a_round_costs_much_there_are_fewer(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Consensus.agree

    def slow(self: Consensus, numbers: Sequence[int]) -> list[int]:
        clock.now += 0.01
        return ask(self, numbers)

    monkeypatch.setattr(Consensus, "agree", slow)
    found = rounds(Consensus(world), clock, 1000, 0.05)
    gaps = [later - earlier for earlier, later in pairwise(found[8:])]
    assert min(gaps) >= 18, "a hundredth of the time"
    assert max(gaps) <= 21


def test_between_long_pieces_there_is_always_one(world: World, clock: Clock) -> None:
    assert rounds(Consensus(world), clock, 20, 1.0) == list(range(20))


def test_work_of_another_kind_is_not_kept_waiting(world: World, clock: Clock) -> None:
    busy = Consensus(world)
    rounds(busy, clock, 1000, 0.001)
    assert rounds(busy, clock, 3, 30.0, "long") == [0, 1, 2]


def test_the_largest_of_each_number_comes_back(world: World) -> None:
    assert Consensus(world).agree([3, 0, 7]) == [3, 0, 7]
    assert Consensus(world).agree_between("work", [2, 1]) == [2, 1]
