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
TIME_LIMIT = REASONS[signal.SIGUSR2][0]


class StopFlag:
    """Remembers the weightiest signal heard.

    Attributes:
        heard: by this rank itself: 0 while nothing asks to stop, else a key of REASON_OF_CODE.
        heard_of: from other ranks, or the clock. Apart, because a signal may come between reading and writing.
    """

    def __init__(self) -> None:
        self.heard = 0
        self.heard_of = 0

    @property
    def code(self) -> int:
        """The weightiest of all: 0, or a key of REASON_OF_CODE."""
        return max(self.heard, self.heard_of)

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

    def time_is_up(self) -> None:
        """Take it as told that the time limit is near, though no signal says so."""
        self.hear_of(TIME_LIMIT)

    def hear_of(self, code: int) -> None:
        """Take it as told what somebody else was."""
        self.heard_of = max(self.heard_of, code)

    def _heard(self, number: int, frame: FrameType | None = None) -> None:
        self.heard = max(self.heard, REASONS[signal.Signals(number)][0])


class Interrupted(Exception):
    """A piece of work was dropped because of a stop."""


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
