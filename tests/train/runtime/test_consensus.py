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
    """The pieces of work that had a round before them."""
    found = []
    for piece in range(pieces):
        if consensus_.agree_between(kind, [piece]) is not None:
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
