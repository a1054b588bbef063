"""When the next checkpoint is due, and how long before its end an attempt has to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from hpc_rlhf.spec.fields import seconds
from hpc_rlhf.spec.training import TrainingSpec

# Checkpoints count as at least this many seconds: lower costs cannot be measured.
MIN_COST = 0.1
# Assumed cost of a checkpoint until one has been made, in seconds.
INITIAL_COST = 1.0
# Seconds kept free for the requeue, and for a save that takes longer than those before.
SLACK = 15.0
# Seconds that a job may exist before its script runs, for instance in a prolog.
_MAX_PROLOG = 120.0


def daly(cost: float, mttf: float) -> float:
    """Seconds between checkpoints that lose the least time: Young's and Daly's sqrt(2 * cost * mttf).

    Args:
        cost: seconds for which a checkpoint stalls training.
        mttf: mean seconds to a failure without warning.
    """
    return math.sqrt(2 * max(cost, MIN_COST) * mttf)


def time_used(start: float, now: float, script: float | None) -> float:
    """Seconds of a job's time that have passed, whether or not the node's clock agrees with the controller's.

    Args:
        start: of the job, by the controller's clock.
        now: by the node's clock.
        script: age of the job's script in seconds, independent of any clock; None if unknown.
    """
    used = now - start
    if script is None or 0 <= used - script <= _MAX_PROLOG:
        return used
    return script


@dataclass
class CheckpointSchedule:
    """When checkpoints are due. Rank 0 decides, except for ``steps``, which all ranks know.

    Attributes:
        steps: between checkpoints, or None.
        seconds: between checkpoints, or None.
        mttf: used if both are None; see ``daly``.
        cost: seconds for which the latest checkpoint stalled training.
    """

    steps: int | None = None
    seconds: float | None = None
    mttf: float = math.inf
    cost: float = INITIAL_COST
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, spec: TrainingSpec) -> CheckpointSchedule:
        """The schedule that a stage's spec sets."""
        every = spec.checkpoint_every
        if isinstance(every, int):
            return cls(steps=every)
        return cls(mttf=seconds(spec.mttf)) if every == "auto" else cls(seconds=seconds(every))

    def due(self, step: int, part: int) -> bool:
        """Whether to save after ``step`` steps and ``part`` parts of the next one."""
        if self.steps is not None:
            return step > 0 and part == 0 and step % self.steps == 0
        interval = daly(self.cost, self.mttf) if self.seconds is None else self.seconds
        return time.monotonic() - self.last >= interval

    def saved(self, cost: float) -> None:
        self.cost, self.last = cost, time.monotonic()


@dataclass
class Deadline:
    """The end of an attempt's time, as rank 0 sees it.

    Attributes:
        end: by ``time.monotonic``, which clock changes do not affect; infinite without a limit.
        save: seconds that the longest save took.
        longest: seconds from each kind of safe point to the next one; keyed by the parts of a step that are done there.
    """

    end: float = math.inf
    save: float = 0.0
    longest: dict[int, float] = field(default_factory=dict)
    _since: tuple[int, float] | None = None

    def reached_at(self, part: int) -> bool:
        """Whether to stop at this safe point, because the next one may come too late to save there in time.

        False if this attempt does not know yet how long the next one takes.
        """
        now = time.monotonic()
        if self._since is not None:
            previous, since = self._since
            self.longest[previous] = max(self.longest.get(previous, 0.0), now - since)
        self._since = (part, now)
        return part in self.longest and self._remaining() <= self.longest[part]

    def restart_timer(self) -> None:
        """Leave the time since the last safe point out, because it was spent on saving."""
        if self._since is not None:
            self._since = (self._since[0], time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether to stop at once: there is just enough time left to save."""
        return self._remaining() <= 0

    def _remaining(self) -> float:
        return self.end - time.monotonic() - self.save - SLACK
