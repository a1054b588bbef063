"""When the next checkpoint is due, and how long before its end an attempt has to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from hpc_rlhf.spec.fields import seconds
from hpc_rlhf.spec.training import TrainingSpec

# Seconds by which checkpoints cost less than can be measured.
LEAST_COST = 0.1
# What a checkpoint is taken to cost until one has been made, in seconds.
FIRST_COST = 1.0
# Seconds left for asking to be requeued, and for a save that takes longer than those before.
SLACK = 15.0
# Seconds that a job may have been there before its script, as for a prolog.
_BEFORE_SCRIPT = 120.0


def daly(cost: float, mttf: float) -> float:
    """Seconds between checkpoints that lose the least: Young's and Daly's sqrt(2 * cost * mttf).

    Args:
        cost: seconds that training stands still for one.
        mttf: mean seconds to a failure that comes unannounced.
    """
    return math.sqrt(2 * max(cost, LEAST_COST) * mttf)


def time_used(start: float, now: float, script: float | None) -> float:
    """Seconds of a job's time that are gone, whether or not the node's clock agrees with the controller's.

    Args:
        start: of the job, by the controller's clock.
        now: by the node's clock.
        script: seconds since the job's script began, by no clock; None where that is not known.
    """
    used = now - start
    if script is None or 0 <= used - script <= _BEFORE_SCRIPT:
        return used
    return script


@dataclass
class Cadence:
    """When checkpoints are due; asked on rank 0, except for ``steps``, which all ranks know.

    Attributes:
        steps: between checkpoints, or None.
        seconds: between checkpoints, or None.
        mttf: where both are None; see ``daly``.
        cost: seconds that training stood still for the latest checkpoint.
    """

    steps: int | None = None
    seconds: float | None = None
    mttf: float = math.inf
    cost: float = FIRST_COST
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, spec: TrainingSpec) -> Cadence:
        """As a stage asks for it."""
        every = spec.checkpoint_every
        if isinstance(every, int):
            return cls(steps=every)
        return cls(mttf=seconds(spec.mttf)) if every == "auto" else cls(seconds=seconds(every))

    def due(self, step: int, part: int) -> bool:
        """Whether to save after so many steps, and parts of the next one."""
        if self.steps is not None:
            return step > 0 and part == 0 and step % self.steps == 0
        seconds = daly(self.cost, self.mttf) if self.seconds is None else self.seconds
        return time.monotonic() - self.last >= seconds

    def saved(self, cost: float) -> None:
        self.cost, self.last = cost, time.monotonic()


@dataclass
class Deadline:
    """The end of an attempt's time, as rank 0 sees it.

    Attributes:
        end: by ``time.monotonic``, which no change of the clock moves; without end where nobody limits it.
        save: seconds that the longest save took.
        longest: seconds from each kind of safe point to the next, by the parts of a step that are done there.
    """

    end: float = math.inf
    save: float = 0.0
    longest: dict[int, float] = field(default_factory=dict)
    _since: tuple[int, float] | None = None

    def at(self, part: int) -> bool:
        """Whether to stop at a safe point: what comes until the next one may not be done and saved in time.

        Where this attempt does not know yet how long that takes, it is tried.
        """
        now = time.monotonic()
        if self._since is not None:
            before, since = self._since
            self.longest[before] = max(self.longest.get(before, 0.0), now - since)
        self._since = (part, now)
        return part in self.longest and self._left() <= self.longest[part]

    def went_on(self) -> None:
        """Do not count a save as a part of the work."""
        if self._since is not None:
            self._since = (self._since[0], time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether to stop wherever it is: there is just enough time left to save."""
        return self._left() <= 0

    def _left(self) -> float:
        return self.end - time.monotonic() - self.save - SLACK
