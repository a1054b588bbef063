"""A stage's events, one after the other, turned into the spans of its time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hpc_rlhf.observe.goodput.clocks import Clock
from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Interruption, Spans, Stretch
from hpc_rlhf.run import reasons
from hpc_rlhf.run.events import (
    Cancelled,
    Ended,
    Event,
    Failed,
    Finished,
    Hang,
    Interrupted,
    Ready,
    Refused,
    Requeued,
    Resumed,
    Retried,
    RetryRequested,
    Saved,
    Started,
    Stopped,
    Stopping,
    Submitted,
    Submitting,
)

_Place = tuple[int, int]  # steps done, and parts of the step after those
_END: _Place = (2**62, 0)

STOPPED_HERE = "stopped by a person"
NO_WORD = "without a word"
# Other events of an attempt count whichever attempt writes them.
_BY_OWNER = (Resumed, Ready, Saved, Stopping, Requeued, Interrupted)


@dataclass
class _Work:
    """Seconds of work.

    Attributes:
        place: where it led to; unknown for the last of an attempt that broke off.
        after: where it began.
        broke: number of the interruption that broke it off.
        stretch: when that was, and whose.
    """

    place: _Place | None
    stretch: Stretch
    after: _Place = (0, 0)
    broke: int = -1

    @property
    def seconds(self) -> float:
        return self.stretch.end - self.stretch.start


@dataclass
class StageTime:
    """A stage's time, taken event by event in the order written.

    Attributes:
        needs: stages that it still waits for.
        until: up to when its time is accounted for; None before it was sent off.
        phase: what it does since: wait (for the queue, a stage or a person), start, work, or save before a stop.
        stands: a person has to send it off.
        attempt: name of the attempt at work.
        last: when that attempt last gave a sign.
        saved: the place up to which its work is kept.
        kept: the place from which the next attempt would go on.
        dropped: seconds of work that it let go of as it stopped.
        judged: whether the latest interruption has its `ended`.
    """

    needs: set[str]
    until: float | None = None
    phase: str = "wait"
    stands: bool = False
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
    broken: list[Interruption] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def take(self, event: Event, time: float, clock: Clock) -> None:
        """Account for one event of this stage."""
        if self.until is None:
            if not isinstance(event, (Submitted, Started)):
                return
            self.until = time - (event.age if isinstance(event, Started) else 0.0)
        if isinstance(event, _BY_OWNER) and event.attempt not in ("", self.attempt):
            return  # written by an attempt that no longer owns the stage
        self._take(event, time, clock)
        if self.phase != "wait":
            self.last = time

    def _take(self, event: Event, time: float, clock: Clock) -> None:
        match event:
            case Started():
                self._started(event, time)
            case Cancelled():
                self._cancelled(event, time)
            case Ended():
                self._ended(event, time, clock)
            case Retried():
                self._retried(event, time)
            case Submitting() | Submitted() | RetryRequested() | Stopped() | Refused() if (
                self.phase == "wait"
            ):
                self._waited(time)
                self.stands = isinstance(event, (Stopped, Refused))
            case Interrupted():
                if self.phase != "wait":
                    self._over(time, STOPPED_HERE, event)
                self.stands = True
            case _ if self.phase == "wait":
                pass  # late events of an attempt that is over
            case Resumed():
                self.resumed = event.place
            case Ready() if self.phase == "start":
                self._begin(time, event.place)
            case Saved():
                self._saved(event, time)
            case Stopping():
                self._stopping(event, time)
            case Requeued():
                self._over(time, event.reason or NO_WORD, event)
            case Failed():
                self._over(time, reasons.FAILED, event)
            case Hang():
                self._over(time, reasons.HANG, event)
            case Finished():
                self._finished(time)

    def let_go(self, stage: str, time: float) -> None:
        """A stage has finished, for which this one may have waited."""
        if stage in self.needs:
            if self.phase == "wait" and self.until is not None:
                self._waited(time)
            self.needs.discard(stage)

    def close(self, now: float, at_work: bool, queued: bool) -> None:
        """The ledger is at its end; the rest of the time is known by what the stage does now."""
        if self.until is None:
            return
        if self.phase != "wait" and not at_work:
            self._over(self.last, reasons.CANCELLED_BY_TOOL if self.cancelled else NO_WORD)
        if self.phase == "wait":
            if queued or at_work:
                self._waited(now)
        elif self.phase == "start":
            self._spend("starting", now)
        elif self.phase == "save":
            self._spend("saving", now)
        elif self.phase == "work":
            self._worked(now, _END)

    def goodput(self) -> Goodput:
        for work in self.work:  # of what was not saved, and no attempt came after
            kept = work.place is not None and (work.place <= self.kept or work.place == _END)
            self._count(work, "productive" if kept else "lost")
        self.work = []
        in_order = sorted(self.stretches, key=lambda stretch: stretch.start)
        return Goodput(Spans(**self.times), tuple(self.broken), tuple(in_order))

    # Events

    def _started(self, event: Started, time: float) -> None:
        if self.phase != "wait":
            self._over(self.last, NO_WORD)
        self._waited(max(self._at, time - event.age))
        self.phase, self.attempt, self.node = "start", event.attempt, event.host
        self._spend("starting", time)
        self.saved = self.resumed = (0, 0)
        self.stands, self.cancelled, self.dropped = False, False, 0.0
        self.needs = set()

    def _saved(self, event: Saved, time: float) -> None:
        place, began = event.place, time - event.seconds
        if self.phase == "start":  # an old ledger, without `ready`
            self._begin(began, self.resumed)
        if self.phase == "work":
            self._worked(began, place)
            self._spend("saving", min(time, self._at + event.stall))
        self.saved = self.kept = place

    def _stopping(self, event: Stopping, time: float) -> None:
        if self.phase == "start":
            self._spend("starting", time)
        elif self.phase == "work":
            self._worked(time - event.dropped, event.place)
            self.dropped = self._spend("lost", time)
        self.phase = "save"

    def _finished(self, time: float) -> None:
        if self.phase == "start":
            self._spend("starting", time)
        elif self.phase == "work":
            self._worked(time, _END)
        elif self.phase == "save":
            self._spend("saving", time)
        self.phase, self.judged, self.stands = "wait", True, True

    def _cancelled(self, event: Cancelled, time: float) -> None:
        if self.phase == "wait":
            self._waited(time)
            self.stands = True
        elif event.attempt:  # by hand, unless the tool has told of it before
            tool = self.cancelled
            self._over(time, reasons.CANCELLED_BY_TOOL if tool else reasons.CANCELLED_BY_HAND, event)
            self.stands = True
        else:
            self.cancelled = True  # the ranks may save yet

    def _ended(self, event: Ended, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            seen = clock.corrected(self.attempt, event.seen or 0.0)
            end = time if self.phase == "start" else min(time, max(self.last, seen))
            self._over(end, event.reason or NO_WORD, event)
        elif self.judged:  # no attempt started
            self._waited(time)
            self.broken.append(_interruption(event, time, event.reason or NO_WORD, ""))
        else:
            last = self.broken[-1]
            # The judgement refines a failure; what all ranks agreed on needs none.
            better = (
                event.reason if last.reason in (reasons.FAILED, NO_WORD) and event.reason else last.reason
            )
            node, step = event.node or last.node, max(last.step, event.step)
            self.broken[-1] = replace(last, reason=better, node=node, step=step)
        self.judged = True
        self._waited(time)
        self.stands = event.job_id is None  # without Slurm only `retried` starts it again

    def _retried(self, event: Retried, time: float) -> None:
        if self.phase == "wait":
            if event.job_id is None:
                self.stands = False  # it was waiting for the delay to pass
            self._waited(time)
            self.stands = False

    # Time

    @property
    def _at(self) -> float:
        assert self.until is not None
        return self.until

    def _spend(self, span: str, until: float) -> float:
        """Count the time up to a moment, which may be past already, as that of a span."""
        seconds = max(0.0, until - self._at)
        self._add(Stretch(span, self._at, self._at + seconds, self.attempt))
        self.until = self._at + seconds
        if span == "starting" and self.broken:
            self.broken[-1] = replace(self.broken[-1], starting=self.broken[-1].starting + seconds)
        return seconds

    def _waited(self, until: float) -> None:
        self._spend("waiting" if self.stands or self.needs else "queued", until)

    def _begin(self, time: float, place: _Place) -> None:
        """The attempt goes on from a place: work that led further is lost."""
        self._spend("starting", time)
        self.phase, self.saved, self.kept = "work", place, place
        kept = []
        for work in self.work:
            if work.place is None and place > work.after:
                work.place = place  # it was saved there, and broke off before it could say so
            if work.place is not None and work.place <= place:
                kept.append(work)
            else:
                self._count(work, "lost")
        self.work = kept

    def _worked(self, until: float, place: _Place | None) -> None:
        seconds = max(0.0, until - self._at)
        stretch = Stretch("productive", self._at, self._at + seconds, self.attempt)
        self.until = stretch.end
        self.work.append(_Work(place, stretch, self.saved, len(self.broken) if place is None else -1))

    def _add(self, stretch: Stretch) -> None:
        self.times[stretch.span] += stretch.end - stretch.start
        if stretch.end > stretch.start:
            self.stretches.append(stretch)

    def _count(self, work: _Work, span: str) -> None:
        self._add(replace(work.stretch, span=span))
        if span == "lost" and self.broken:
            why = self.broken[work.broke]
            self.broken[work.broke] = replace(why, lost=why.lost + work.seconds)

    def _over(self, time: float, reason: str, event: Event | None = None) -> None:
        """The attempt has ended without finishing; ``event`` shows that."""
        if self.phase == "work":
            self._worked(time, None)
        else:
            self._spend({"start": "starting", "save": "saving"}[self.phase], time)
        broken = _interruption(event, self._at, reason, self.node, self.saved[0])
        self.broken.append(replace(broken, lost=self.dropped, attempt=self.attempt))
        self.phase, self.judged, self.stands, self.dropped = "wait", False, False, 0.0


def _interruption(event: Event | None, time: float, reason: str, node: str, step: int = 0) -> Interruption:
    node = getattr(event, "node", "") or getattr(event, "host", "") or node
    return Interruption(reason, time, node, max(step, getattr(event, "step", 0)))
