"""How code learns that its attempt must stop, and stops it on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from hpc_rlhf.train.runtime.consensus import Consensus
from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StageStopped, StopFlag, WorkCancelled
from hpc_rlhf.train.runtime.watchdog import Heartbeat


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

    def __init__(self, flag: StopFlag, consensus: Consensus) -> None:
        self.flag = flag
        self.consensus = consensus
        self.heartbeat = Heartbeat()
        self.save: Callable[[str], int] = lambda reason: 0
        self._cancellable = 0

    def should_stop(self) -> bool:
        """Whether this rank knows of a stop. Not collective: the watchdog informs the other ranks within a
        second."""
        self.heartbeat.beat()
        return self.flag.code > 0

    def check(self, kind: str | None = None) -> None:
        """Stop if any rank has to: inside ``cancellable`` cancel the work, elsewhere end the attempt.
        Collective.

        What is saved is the last safe point, so weights and optimizers must be as they were there.

        Args:
            kind: of work that is done in many pieces, each of which takes about the same time. Ranks then
                agree only every so many pieces, so that the cost is bounded. Without it they agree at once.

        Raises:
            WorkCancelled: inside ``cancellable``.
            StageStopped: elsewhere, after saving if there is anything to save.
        """
        codes: Sequence[int] | None
        if kind is None:  # no heartbeat: loading, before the first piece of work, may take long
            codes = self.consensus.agree([self.flag.code])
        else:
            self.heartbeat.beat()
            codes = self.consensus.agree_between(kind, [self.flag.code])
        if codes:
            self._stop(codes[0])

    def check_with(self, numbers: Sequence[int]) -> list[int]:
        """Agree on more than the stop in one round: the largest of all ranks' numbers, elementwise. See
        ``check``."""
        self.heartbeat.beat()
        code, *largest = self.consensus.agree([self.flag.code, *numbers])
        self._stop(code)
        return largest

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """Run work that any rank may abandon with WorkCancelled; then all ranks stop together. Collective; see
        ``check``."""
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
