"""Agreement among ranks between pieces of work, at a bounded cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hpc_rlhf.train.runtime.world import World

# Seconds between two rounds where pieces of work are shorter: at least and at most, roughly.
MIN_INTERVAL, MAX_INTERVAL = 0.25, 2.0
# Share of the time that rounds may take, within those bounds.
MAX_OVERHEAD = 0.01


@dataclass
class _Pace:
    """How often ranks hold a round between pieces of one kind of work; the same on all ranks except for the
    times.

    Attributes:
        every: pieces from one round to the next.
        remaining: pieces until the next round.
        last_round: when the last round ended.
        cost: seconds that it took.
    """

    every: int = 1
    remaining: int = 1
    last_round: float = -math.inf
    cost: float = 0.0


class Consensus:
    """Rounds in which every rank contributes some numbers and gets the largest of each.

    Ranks do the same pieces of work in the same order, so they count them alike. A round also settles how many pieces
    pass until the next one: as many as the rank that wants the fewest, and at most twice as many as before.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._paces: dict[str, _Pace] = {}

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks' numbers, elementwise. Collective."""
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.world.control)
        return [int(number) for number in tensor.tolist()]

    def agree_between(self, kind: str, numbers: Sequence[int]) -> list[int] | None:
        """The same between pieces of work; None if no round is due yet. Collective.

        Args:
            kind: of work, whose pieces take about the same time each.
        """
        pace = self._paces.setdefault(kind, _Pace())
        pace.remaining -= 1
        if pace.remaining:
            return None
        seconds = max(1e-6, (time.monotonic() - pace.last_round) / pace.every)
        interval = min(MAX_INTERVAL, max(MIN_INTERVAL, pace.cost / MAX_OVERHEAD))
        wanted = max(1, min(2 * pace.every, int(interval / seconds)))
        start = time.monotonic()
        *largest, fewest = self.agree([*numbers, -wanted])
        pace.every = pace.remaining = -fewest
        pace.last_round = time.monotonic()
        pace.cost = pace.last_round - start  # includes waiting for the other ranks; the last rank never waits
        return largest
