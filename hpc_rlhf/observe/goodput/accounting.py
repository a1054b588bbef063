"""Where the time of each stage went, from the events of a ledger. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpc_rlhf.observe.goodput.clocks import Clock
from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Interruption, Spans, Stretch
from hpc_rlhf.run import events, reasons
from hpc_rlhf.run.events import Event

_Place = tuple[int, int]  # steps done, and parts of the step after those
_END: _Place = (2**62, 0)

STOPPED_BY_USER = "stopped by the user"
UNKNOWN = "unknown cause"
# Events that count only if the attempt that owns the stage wrote them.
_BY_OWNER = (events.Resumed, events.Ready, events.Saved, events.Stopping, events.Requeued, events.Interrupted)


def measure(
    ledger: Sequence[Event],
    needs: Mapping[str, Collection[str]],
    at_work: Collection[str] = (),
    queued: Collection[str] = (),
    now: float = 0.0,
) -> dict[str, Goodput]:
    """Where the time of each stage went.

    Clocks of machines differ, and may step. The order of the events outranks their times: the times of an attempt are
    corrected by as much as its clock is wrong, so no span is negative, and none is a day too long.

    Args:
        ledger: its events, in the order written.
        needs: the stages that each stage waits for.
        at_work: stages with a running attempt; that of any other stage is over.
        queued: stages that will run without the user doing anything.
        now: Unix seconds up to which the time of those two is counted; that of others ends at their last event.
    """
    stages = {stage: StageTime(set(needs[stage])) for stage in needs}
    clock = Clock(ledger, now)
    for event, time in clock.events():
        stage = stages.get(event.stage)
        if stage is None:
            continue
        stage.take(event, time, clock)
        if isinstance(event, events.Finished):
            for other in stages.values():
                other.need_finished(event.stage, time)
    for name, stage in stages.items():
        stage.close(max(now, clock.now), name in at_work, name in queued)
    return {name: stage.goodput() for name, stage in stages.items()}


@dataclass
class _Work:
    """Seconds of work.

    Attributes:
        place: what it reached; unknown for the last work of an attempt that was interrupted.
        after: where it began.
        interruption: index of the interruption that ended it.
        stretch: when it was done, and by which attempt.
    """

    place: _Place | None
    stretch: Stretch
    after: _Place = (0, 0)
    interruption: int = -1


@dataclass
class StageTime:
    """A stage's time, computed event by event in the order written.

    Attributes:
        needs: stages that it still waits for.
        until: up to when its time is accounted for; None before it was submitted.
        phase: what it has been doing since: waiting (for the queue, a stage or the user), starting, working, or saving
            before a stop.
        needs_user: only the user can submit it again.
        attempt: name of the running attempt.
        last: time of that attempt's last event.
        saved: the last place that this attempt saved.
        kept: the place from which the next attempt would resume.
        dropped: seconds of work that the attempt discarded as it stopped.
        judged: whether the latest interruption has its `ended`.
    """

    needs: set[str]
    until: float | None = None
    phase: str = "waiting"
    needs_user: bool = False
    attempt: str = ""
    node: str = ""
    last: float = 0.0
    saved: _Place = (0, 0)
    kept: _Place = (0, 0)
    resumed: _Place = (0, 0)
    cancelled: bool = False
    dropped: float = 0.0
    judged: bool = True
    times: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPANS, 0.0))
    work: list[_Work] = field(default_factory=list)
    interruptions: list[Interruption] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def take(self, event: Event, time: float, clock: Clock) -> None:
        """Account for one event of this stage."""
        if self.until is None:
            if not isinstance(event, (events.Submitted, events.Started)):
                return
            self.until = time - (event.age if isinstance(event, events.Started) else 0.0)
        if isinstance(event, _BY_OWNER) and event.attempt not in ("", self.attempt):
            return  # written by an attempt that no longer owns the stage
        self._take(event, time, clock)
        if self.phase != "waiting":
            self.last = time

    def _take(self, event: Event, time: float, clock: Clock) -> None:
        match event:
            case events.Started():
                self._started(event, time)
            case events.Cancelled():
                self._cancelled(event, time)
            case events.Ended():
                self._ended(event, time, clock)
            case events.Retried():
                self._retried(event, time)
            case (
                events.Submitting() | events.Submitted() | events.RetryRequested() | events.Stopped() | events.Refused()
            ):
                if self.phase == "waiting":
                    self._waited(time)
                    self.needs_user = isinstance(event, (events.Stopped, events.Refused))
            case events.Interrupted():
                if self.phase != "waiting":
                    self._over(time, STOPPED_BY_USER, event)
                self.needs_user = True
            case _ if self.phase == "waiting":
                pass  # late events of an attempt that is over
            case events.Resumed():
                self.resumed = event.place
            case events.Ready() if self.phase == "starting":
                self._begin(time, event.place)
            case events.Saved():
                self._saved(event, time)
            case events.Stopping():
                self._stopping(event, time)
            case events.Requeued():
                self._over(time, event.reason or UNKNOWN, event)
            case events.Failed():
                self._over(time, reasons.FAILED, event)
            case events.Hang():
                self._over(time, reasons.HANG, event)
            case events.Finished():
                self._finished(time)

    def need_finished(self, stage: str, time: float) -> None:
        """A stage has finished that this one may have waited for."""
        if stage in self.needs:
            if self.phase == "waiting" and self.until is not None:
                self._waited(time)
            self.needs.discard(stage)

    def close(self, now: float, at_work: bool, queued: bool) -> None:
        """Account for the time since the last event, from the stage's current state."""
        if self.until is None:
            return
        if self.phase != "waiting" and not at_work:
            self._over(self.last, reasons.CANCELLED_BY_TOOL if self.cancelled else UNKNOWN)
        if self.phase == "waiting":
            if queued or at_work:
                self._waited(now)
        else:
            self._went_on(now, _END)

    def goodput(self) -> Goodput:
        for work in self.work:  # not saved, and no attempt has started since
            kept = work.place is not None and (work.place <= self.kept or work.place == _END)
            self._count(work, "productive" if kept else "lost")
        self.work = []
        in_order = sorted(self.stretches, key=lambda stretch: stretch.start)
        return Goodput(Spans(**self.times), tuple(self.interruptions), tuple(in_order))

    # Events

    def _started(self, event: events.Started, time: float) -> None:
        if self.phase != "waiting":
            self._over(self.last, UNKNOWN)
        self._waited(max(self._at, time - event.age))
        self.phase, self.attempt, self.node = "starting", event.attempt, event.host
        self._spend("starting", time)
        self.saved = self.resumed = (0, 0)
        self.needs_user, self.cancelled, self.dropped = False, False, 0.0
        self.needs = set()

    def _saved(self, event: events.Saved, time: float) -> None:
        place, began = event.place, time - event.seconds
        if self.phase == "starting":  # an older version's ledger, without `ready`
            self._begin(began, self.resumed)
        if self.phase == "working":
            self._worked(began, place)
            self._spend("saving", min(time, self._at + event.stall))
        self.saved = self.kept = place

    def _stopping(self, event: events.Stopping, time: float) -> None:
        if self.phase == "starting":
            self._spend("starting", time)
        elif self.phase == "working":
            self._worked(time - event.dropped, event.place)
            self.dropped = self._spend("lost", time)
        self.phase = "saving"

    def _finished(self, time: float) -> None:
        self._went_on(time, _END)
        self.phase, self.judged, self.needs_user = "waiting", True, True

    def _cancelled(self, event: events.Cancelled, time: float) -> None:
        if self.phase == "waiting":
            self._waited(time)
            self.needs_user = True
        elif event.attempt:  # by hand, unless the tool has recorded it before
            self._over(time, reasons.CANCELLED_BY_TOOL if self.cancelled else reasons.CANCELLED_BY_HAND, event)
            self.needs_user = True
        else:
            self.cancelled = True  # the ranks may still save

    def _ended(self, event: events.Ended, time: float, clock: Clock) -> None:
        if self.phase != "waiting":
            seen = clock.corrected(self.attempt, event.seen or 0.0)
            end = time if self.phase == "starting" else min(time, max(self.last, seen))
            self._over(end, event.reason or UNKNOWN, event)
        elif self.judged:  # no attempt started
            self._waited(time)
            self.interruptions.append(Interruption(event.reason or UNKNOWN, time, event.node, event.step))
        else:
            last = self.interruptions[-1]
            if last.reason in (reasons.FAILED, UNKNOWN):  # what all ranks agreed on is not refined
                last.reason = event.reason or last.reason
            last.node, last.step = event.node or last.node, max(last.step, event.step)
        self.judged = True
        self._waited(time)
        self.needs_user = event.job_id is None  # without Slurm only `retried` starts it again

    def _retried(self, event: events.Retried, time: float) -> None:
        if self.phase == "waiting":
            if event.job_id is None:
                self.needs_user = False  # it was waiting for the delay to pass
            self._waited(time)
            self.needs_user = False

    # Time

    @property
    def _at(self) -> float:
        assert self.until is not None
        return self.until

    def _spend(self, span: str, until: float) -> float:
        """Add the time up to a moment to a span and return its seconds."""
        stretch = self._stretch(span, until)
        self._add(stretch)
        if span == "starting" and self.interruptions:
            self.interruptions[-1].starting += stretch.seconds
        return stretch.seconds

    def _stretch(self, span: str, until: float) -> Stretch:
        """The time up to a moment, which may have passed already."""
        start = self._at
        self.until = start + max(0.0, until - start)
        return Stretch(span, start, self.until, self.attempt)

    def _waited(self, until: float) -> None:
        self._spend("waiting" if self.needs_user or self.needs else "queued", until)

    def _begin(self, time: float, place: _Place) -> None:
        """The attempt starts from a place: work beyond it is lost."""
        self._spend("starting", time)
        self.phase, self.saved, self.kept = "working", place, place
        kept = []
        for work in self.work:
            if work.place is None and place > work.after:
                work.place = place  # saved, but interrupted before `saved` was written
            if work.place is not None and work.place <= place:
                kept.append(work)
            else:
                self._count(work, "lost")
        self.work = kept

    def _went_on(self, until: float, place: _Place | None) -> None:
        """The attempt did what it was doing; its work reached a place."""
        if self.phase == "working":
            self._worked(until, place)
        else:
            self._spend(self.phase, until)

    def _worked(self, until: float, place: _Place | None) -> None:
        stretch = self._stretch("productive", until)
        self.work.append(_Work(place, stretch, self.saved, len(self.interruptions) if place is None else -1))

    def _add(self, stretch: Stretch) -> None:
        self.times[stretch.span] += stretch.seconds
        if stretch.seconds:
            self.stretches.append(stretch)

    def _count(self, work: _Work, span: str) -> None:
        self._add(replace(work.stretch, span=span))
        if span == "lost" and self.interruptions:
            self.interruptions[work.interruption].lost += work.stretch.seconds

    def _over(self, time: float, reason: str, event: Event | None = None) -> None:
        """The attempt has ended without finishing; ``event`` shows that."""
        self._went_on(time, None)
        node = getattr(event, "node", "") or getattr(event, "host", "") or self.node
        step = max(self.saved[0], getattr(event, "step", 0))
        self.interruptions.append(Interruption(reason, self._at, node, step, self.dropped, attempt=self.attempt))
        self.phase, self.judged, self.needs_user, self.dropped = "waiting", False, False, 0.0
