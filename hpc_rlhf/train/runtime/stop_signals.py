"""Signals that ask a stage to stop: the handler sets a flag and does nothing else."""

from __future__ import annotations

import signal
from types import FrameType

# Codes rise with priority: if ranks were given different reasons, the largest wins.
REASONS = {signal.SIGUSR2: (1, "time limit"), signal.SIGTERM: (2, "preempted"), signal.SIGINT: (3, "interrupted")}
REASON_OF_CODE = dict(REASONS.values())


class StopFlag:
    """Remembers the reason to stop with the highest priority.

    Attributes:
        received: the reason from signals to this rank: 0 while there is none, else a key of REASON_OF_CODE.
        reported: the reason from other ranks or the clock. Separate, because a signal may arrive between a read and a
            write.
    """

    def __init__(self) -> None:
        self.received = 0
        self.reported = 0

    @property
    def code(self) -> int:
        """0, or a key of REASON_OF_CODE."""
        return max(self.received, self.reported)

    @property
    def preempted(self) -> bool:
        return self.code == REASONS[signal.SIGTERM][0]

    def install(self) -> None:
        """Handle SIGUSR2 (Slurm's --signal), SIGTERM (preemption) and SIGINT in the main thread."""
        for number in REASONS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REASONS)  # blocked since the rank started, except over a hostfile

    def restore(self) -> None:
        """Let the signals end the process again."""
        for number in REASONS:
            signal.signal(number, signal.SIG_DFL)

    def preempt(self) -> None:
        """Act as if SIGTERM had arrived: Slurm sent it before this rank existed."""
        self._handle(signal.SIGTERM)

    def expire(self) -> None:
        """Act as if the signal of the time limit had arrived."""
        self.raise_to(REASONS[signal.SIGUSR2][0])

    def raise_to(self, code: int) -> None:
        """Take over a reason from another rank or the clock."""
        self.reported = max(self.reported, code)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        self.received = max(self.received, REASONS[signal.Signals(number)][0])


class WorkCancelled(Exception):
    """A piece of work was cancelled because the attempt must stop."""


class StageStopped(Exception):
    """All ranks agreed to stop, and saved.

    Attributes:
        reason: a value of REASON_OF_CODE.
        step: the step that the checkpoint holds.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"{reason} at step {step}")
        self.reason = reason
        self.step = step
