"""What ranks ask each other between pieces of work, at a bounded cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hpc_rlhf.train.runtime.world import World

# Seconds between two rounds, about, where the pieces of work are shorter: the least and the most.
BETWEEN, MOST = 0.25, 2.0
# Share of the time that rounds may take, within those bounds.
SHARE = 0.01


@dataclass
class _Pace:
    """How often ranks ask between pieces of one kind, the same on all of them."""

    every: int = 1
    left: int = 1
    asked: float = -math.inf
    cost: float = 0.0


class Polls:
    """Rounds in which every rank tells some numbers, and learns the largest of each.

    Ranks do the same pieces of work in the same order, so they also count them alike. A round settles how many pieces
    go by until the next one, by the rank that wishes for the fewest; that number at most doubles from one round to the next.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._paces: dict[str, _Pace] = {}

    def now(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks' numbers, each by itself. Collective."""
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.world.control)
        return [int(number) for number in tensor.tolist()]

    def between(self, kind: str, numbers: Sequence[int]) -> list[int] | None:
        """The same between pieces of work; None where it is not yet time for a round. Collective.

        Args:
            kind: of the work, whose pieces take about the same time each.
        """
        pace = self._paces.setdefault(kind, _Pace())
        pace.left -= 1
        if pace.left:
            return None
        seconds = max(1e-6, (time.monotonic() - pace.asked) / pace.every)
        gap = min(MOST, max(BETWEEN, pace.cost / SHARE))
        wish = max(1, min(2 * pace.every, int(gap / seconds)))
        began = time.monotonic()
        *largest, fewest = self.now([*numbers, -wish])
        pace.every = pace.left = -fewest
        pace.asked = time.monotonic()
        pace.cost = pace.asked - began  # with waiting for the others, of which the last to come has none
        return largest
