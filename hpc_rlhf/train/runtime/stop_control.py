"""How code learns that its attempt must stop, and stops it on all ranks together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StageStopped, StopFlag, WorkCancelled
from hpc_rlhf.train.runtime.watchdog import Heartbeat
from hpc_rlhf.train.runtime.world import World

# Seconds between two rounds where pieces of work are shorter: at least and at most, roughly.
MIN_INTERVAL, MAX_INTERVAL = 0.25, 2.0
# Share of the time that rounds may take, within those bounds.
MAX_OVERHEAD = 0.01


@dataclass
class _Pace:
    """How often ranks hold a round between pieces of one kind of work; the same on all ranks but for the times."""

    every: int = 1  # pieces from one round to the next
    remaining: int = 1  # pieces until the next round
    last_round: float = -math.inf  # when the last round ended
    cost: float = 0.0  # seconds that it took


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
        return self.world.largest(numbers)

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


class StopControl:
    """Whether this attempt should stop, and where it may.

    Between pieces of work, call ``check``. Work that is worth nothing half done, such as a rollout, goes
    inside ``cancellable`` and polls ``should_stop``.

    Args:
        flag: what this rank knows of a stop.

    Attributes:
        heartbeat: shows the watchdog that this rank makes progress.
        save: saves the last safe point, given the reason of the stop, and returns its step. Collective.
    """

    def __init__(self, flag: StopFlag, world: World) -> None:
        self.flag = flag
        self.consensus = Consensus(world)
        self.heartbeat = Heartbeat()
        self.save: Callable[[str], int] = lambda reason: 0  # the Checkpointer replaces it
        self._cancellable = 0

    def should_stop(self) -> bool:
        """Whether this rank knows of a stop. Not collective: the watchdog informs the other ranks within a second."""
        self.heartbeat.beat()
        return self.flag.code > 0

    def check(self, kind: str | None = None) -> None:
        """Stop if any rank has to: inside ``cancellable`` cancel the work, elsewhere end the attempt. Collective.

        What is saved is the last safe point, so weights and optimizers must be as they were there.

        Args:
            kind: of work that is done in many pieces, each of which takes about the same time. Ranks then
                agree only after every few pieces, so that the cost is bounded. Without it they agree at once.

        Raises:
            WorkCancelled: inside ``cancellable``.
            StageStopped: elsewhere, after saving if there is anything to save.
        """
        if kind is None:  # no heartbeat: loading, before the first piece of work, may take long
            codes: Sequence[int] | None = self.consensus.agree([self.flag.code])
        else:
            self.heartbeat.beat()
            codes = self.consensus.agree_between(kind, [self.flag.code])
        if codes:
            self._stop(codes[0])

    def check_with(self, numbers: Sequence[int]) -> list[int]:
        """Agree on the stop as ``check`` does, and in the same round on the largest of each number over all ranks."""
        self.heartbeat.beat()
        code, *largest = self.consensus.agree([self.flag.code, *numbers])
        self._stop(code)
        return largest

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """Work that any rank may abandon with WorkCancelled; then all ranks stop, as in ``check``. Collective."""
        self._cancellable += 1
        try:
            with suppress(WorkCancelled):
                yield
        finally:
            self._cancellable -= 1
        self.check()

    def _stop(self, code: int) -> None:
        if not code:
            return
        if self._cancellable:
            raise WorkCancelled
        reason = REASON_OF_CODE[code]
        raise StageStopped(reason, self.save(reason))
