"""Signals that ask a stage to stop: a handler sets a flag and does nothing else."""

from __future__ import annotations

import signal
from types import FrameType

# In rising order of weight: when ranks were told different things, the largest counts.
REASONS = {
    signal.SIGUSR2: (1, "time limit"),
    signal.SIGTERM: (2, "preempted"),
    signal.SIGINT: (3, "interrupted"),
}
REASON_OF_CODE = dict(REASONS.values())


class StopFlag:
    """Remembers the weightiest signal heard.

    Attributes:
        code: 0 while nothing asks to stop, else a key of REASON_OF_CODE.
    """

    def __init__(self) -> None:
        self.code = 0

    @property
    def preempted(self) -> bool:
        return self.code == REASONS[signal.SIGTERM][0]

    def install(self) -> None:
        """Take over SIGUSR2 (Slurm's --signal), SIGTERM (preemption) and SIGINT in the main thread."""
        for number in REASONS:
            signal.signal(number, self._heard)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REASONS)  # held back since the rank started

    def restore(self) -> None:
        """Let the signals end the process again."""
        for number in REASONS:
            signal.signal(number, signal.SIG_DFL)

    def preempt(self) -> None:
        """Take it as preempted: Slurm sent the signal when there was no rank yet to hear it."""
        self._heard(signal.SIGTERM)

    def _heard(self, number: int, frame: FrameType | None = None) -> None:
        self.code = max(self.code, REASONS[signal.Signals(number)][0])


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
