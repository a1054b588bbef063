"""Where the time of a stage or a run went, and what interrupted it.

ETTR, the effective training time ratio, is that of Meta's "Revisiting Reliability in Large-Scale Machine
Learning Research Clusters" (arXiv 2410.21680): productive time / wall-clock in the allocation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_rlhf.run.format import duration


@dataclass(frozen=True)
class Spans:
    """Where the seconds went. Every moment from the first ``submitted`` or ``started`` on is in one span.

    Attributes:
        waiting: it could not run: a stage that it needs was not done, or it was stopped until the user
            submitted it again.
        queued: it could run, but no attempt was running.
        starting: from the start of rank 0's process until the attempt's first step, including a stage's
            measurements before its first step.
        productive: work on steps that were kept, and on exporting the model.
        lost: work that was or will be repeated: all after the place from which the next attempt resumed, or,
            if there is none yet, after the last place saved.
        saving: training stood still for a checkpoint, or for the last one before a stop.
    """

    waiting: float = 0.0
    queued: float = 0.0
    starting: float = 0.0
    productive: float = 0.0
    lost: float = 0.0
    saving: float = 0.0

    @property
    def allocated(self) -> float:
        """Seconds in which attempts had their nodes."""
        return self.starting + self.productive + self.lost + self.saving

    @property
    def wall(self) -> float:
        """All of them."""
        return self.waiting + self.queued + self.allocated

    @property
    def ettr(self) -> float | None:
        """Productive time / time in the allocation; None before the first attempt."""
        return self.productive / self.allocated if self.allocated > 0 else None

    def __add__(self, other: Spans) -> Spans:
        return Spans(*(getattr(self, name) + getattr(other, name) for name in SPANS))


SPANS = tuple(Spans.__dataclass_fields__)


@dataclass(frozen=True)
class Stretch:
    """A part of a stage's time that went into one span.

    Attributes:
        span: a name in SPANS.
        start, end: in Unix seconds, by a clock that never goes backwards.
        attempt: the running attempt; between two attempts the earlier one; before the first empty.
    """

    span: str
    start: float
    end: float
    attempt: str

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Interruption:
    """An attempt that ended without finishing its stage.

    Attributes:
        reason: as the attempt reported it, else as it was judged.
        time: when, in Unix seconds.
        node: where it began, or which failed; empty if unknown.
        step: the last step it did.
        lost: seconds of work that were or will be repeated.
        starting: seconds that the next attempt took until its first step.
        attempt: its name; empty if unknown.
    """

    reason: str
    time: float
    node: str
    step: int
    lost: float = 0.0
    starting: float = 0.0
    attempt: str = ""


@dataclass(frozen=True)
class Goodput:
    """Where a stage's time went, or a run's: the sums over its stages, which may run in parallel.

    Attributes:
        stretches: a stage's, in the order of time; they add up to its spans.
    """

    spans: Spans = Spans()
    interruptions: tuple[Interruption, ...] = ()
    stretches: tuple[Stretch, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As `status --json` shows it."""
        spans = {name: round(getattr(self.spans, name), 3) for name in SPANS}
        ettr = self.spans.ettr
        return {
            **spans,
            "wall": round(self.spans.wall, 3),
            "ettr": None if ettr is None else round(ettr, 4),
            "interruptions": [_rounded(each) for each in self.interruptions],
        }


def _rounded(each: Interruption) -> dict[str, object]:
    facts = {"reason": each.reason, "time": round(each.time, 3), "node": each.node, "step": each.step}
    return {**facts, "lost": round(each.lost, 3), "starting": round(each.starting, 3)}


def total(stages: Mapping[str, Goodput]) -> Goodput:
    """The sums over a run's stages, and all their interruptions in the order of time."""
    interruptions = [each for stage in stages.values() for each in stage.interruptions]
    spans = sum((stage.spans for stage in stages.values()), Spans())
    return Goodput(spans, tuple(sorted(interruptions, key=lambda each: each.time)))


def count_words(interruptions: Sequence[Interruption]) -> str:
    """For example "3 interruptions: 2 preempted, node failure"; empty if there was none."""
    if not interruptions:
        return ""
    reasons = Counter(each.reason for each in interruptions).most_common()
    counts = ", ".join(reason if times == 1 else f"{times} {reason}" for reason, times in reasons)
    return f"{len(interruptions)} interruption{'s' * (len(interruptions) > 1)}: {counts}"


def split_words(spans: Spans) -> str:
    """Where the time went, in a sentence; empty before the first attempt."""
    if spans.ettr is None:
        return ""
    names = ("productive", "starting", "lost", "saving")
    parts = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in names)
    outside = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in ("queued", "waiting"))
    allocated = duration(spans.allocated)
    return f"ETTR {spans.ettr:.2f} of {allocated} in the allocation: {parts}; outside it: {outside}"
