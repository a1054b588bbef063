"""The progress of a stage in the log of rank 0, which `hpc-rlhf logs -f` shows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from hpc_rlhf.run.format import duration, number
from hpc_rlhf.spec.stages import kind_of

# Seconds between lines. The first step, every tenth of the stage and every evaluation have a line in any case.
EVERY = 60.0
_PACE_STEPS = 100  # the pace is that of this many of the latest steps


def say(stage: str, text: str) -> None:
    """Write a line with the time of day to this rank's log."""
    print(f"{time.strftime('%H:%M:%S')} {stage}: {text}", flush=True)


class ProgressLog:
    """Writes how far a stage is, its metrics, its pace and the time left.

    Args:
        say: called with the stage and the text of a line.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, stage: str, say: Callable[[str, str], None] = say, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stage, self._say, self._clock = stage, say, clock
        self._steps: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS + 1)
        self._tenth, self._said = -1, 0.0

    def note(self, step: int, total: int, event: str, values: Mapping[str, float | None]) -> None:
        """Take note of the metrics of step ``step`` of ``total``, or of an evaluation after it.

        Args:
            event: ``train`` for a step; anything else is an evaluation.
        """
        now, trained = self._clock(), event == "train"
        if trained:
            self._steps.append((step, now))
            tenth = step * 10 // total
            if tenth == self._tenth and now - self._said < EVERY:
                return
            self._tenth, self._said = tenth, now
        kind = kind_of(self._stage)
        names = kind.shown(values) if trained or not kind.trains else values
        words = [f"{kind.unit} {step:,}/{total:,}"] + ["held out"] * (kind.trains and not trained)
        words += [f"{name} {number(values[name])}" for name in names]
        self._say(self._stage, ", ".join(words + (self._pace(step, total) if trained else [])))

    def _pace(self, step: int, total: int) -> list[str]:
        """The pace and the time left, as far as they are known."""
        (first, began), (last, ended) = self._steps[0], self._steps[-1]
        if last == first or ended <= began:
            return []
        seconds = (ended - began) / (last - first)
        rate = f"{number(1 / seconds)} steps/s" if seconds < 1 else f"{number(seconds)} s per step"
        return [rate, f"{duration((total - step) * seconds)} left"] if step < total else [rate]
