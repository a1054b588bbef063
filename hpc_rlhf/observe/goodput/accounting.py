"""A stage's events, one after the other, turned into the spans of its time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hpc_rlhf.observe.goodput.clocks import Clock, Event
from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Interruption, Spans, Stretch
from hpc_rlhf.run import failures

_Place = tuple[int, int]  # steps done, and parts of the step after those
_END: _Place = (2**62, 0)

STOPPED_HERE = "stopped by a person"
NO_WORD = "without a word"
_SENT_OFF = frozenset({"submitting", "submitted", "retried", "anew"})
_OF_THE_ATTEMPT = frozenset({"resumed", "ready", "saved", "stopping", "requeued", "interrupted"})


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
        """One event of this stage, at its time."""
        kind = event["event"]
        if self.until is None:
            if kind not in ("submitted", "started"):
                return
            self.until = time - (float(event.get("age", 0.0)) if kind == "started" else 0.0)
        if kind in _OF_THE_ATTEMPT and event.get("attempt", self.attempt) != self.attempt:
            return  # of an attempt that no longer owns the stage
        getattr(self, f"_{kind}", self._other)(event, time, clock)
        if self.phase != "wait":
            self.last = time

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
            self._over(self.last, failures.CANCELLED_BY_TOOL if self.cancelled else NO_WORD, {})
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

    def _started(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            self._over(self.last, NO_WORD, {})
        self._waited(max(self._at, time - float(event.get("age", 0.0))))
        self.phase, self.attempt = "start", str(event.get("attempt", ""))
        self.node = str(event.get("host", ""))
        self._spend("starting", time)
        self.saved = self.resumed = (0, 0)
        self.stands, self.cancelled, self.dropped = False, False, 0.0
        self.needs = set()

    def _resumed(self, event: Event, time: float, clock: Clock) -> None:
        self.resumed = _place(event)

    def _ready(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase == "start":
            self._begin(time, _place(event))

    def _saved(self, event: Event, time: float, clock: Clock) -> None:
        place, began = _place(event), time - float(event.get("seconds", 0.0))
        if self.phase == "start":  # an old ledger, without `ready`
            self._begin(began, self.resumed)
        if self.phase == "work":
            self._worked(began, place)
            self._spend("saving", min(time, self._at + float(event.get("stall", 0.0))))
        if self.phase != "wait":
            self.saved = self.kept = place

    def _stopping(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase == "start":
            self._spend("starting", time)
        elif self.phase == "work":
            dropped = float(event.get("dropped", 0.0))
            self._worked(time - dropped, _place(event))
            self.dropped = self._spend("lost", time)
        if self.phase != "wait":
            self.phase = "save"

    def _requeued(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            self._over(time, str(event.get("reason", NO_WORD)), event)

    def _interrupted(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            self._over(time, STOPPED_HERE, event)
        self.stands = True

    def _finished(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase == "start":
            self._spend("starting", time)
        elif self.phase == "work":
            self._worked(time, _END)
        elif self.phase == "save":
            self._spend("saving", time)
        if self.phase != "wait":
            self.phase, self.judged, self.stands = "wait", True, True

    def _failed(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            self._over(time, failures.FAILED, event)

    def _hang(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            self._over(time, failures.HANG, event)

    def _cancelled(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase == "wait":
            self._waited(time)
            self.stands = True
        elif "attempt" in event:  # by hand, unless the tool has told of it before
            tool = self.cancelled
            self._over(time, failures.CANCELLED_BY_TOOL if tool else failures.CANCELLED_BY_HAND, event)
            self.stands = True
        else:
            self.cancelled = True  # the ranks may save yet

    def _ended(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase != "wait":
            seen = clock.mended(self.attempt, float(event.get("seen") or 0.0))
            end = time if self.phase == "start" else min(time, max(self.last, seen))
            self._over(end, str(event.get("reason", NO_WORD)), event)
        elif self.judged:  # it came to no attempt
            self._waited(time)
            self.broken.append(_interruption(event, time, str(event.get("reason", NO_WORD)), ""))
        else:
            said, reason = self.broken[-1], str(event.get("reason", ""))
            # A failure is told apart from others by its judge; what all ranks agreed on needs none.
            better = reason if said.reason in (failures.FAILED, NO_WORD) and reason else said.reason
            node, step = str(event.get("node", "")) or said.node, max(said.step, int(event.get("step") or 0))
            self.broken[-1] = replace(said, reason=better, node=node, step=step)
        self.judged = True
        self._waited(time)
        self.stands = "job_id" not in event  # here it is tried again by `retried` alone

    def _retried(self, event: Event, time: float, clock: Clock) -> None:
        if self.phase == "wait":
            if "job_id" not in event:
                self.stands = False  # what it waited for was the time to try again
            self._other(event, time, clock)

    def _other(self, event: Event, time: float, clock: Clock) -> None:
        """Any other event only tells how the stage goes, sends it off or leaves it to a person."""
        if self.phase == "wait":
            self._waited(time)
            if event["event"] in _SENT_OFF:
                self.stands = False
            elif event["event"] in ("stopped", "refused"):
                self.stands = True

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

    def _over(self, time: float, reason: str, event: Event) -> None:
        """The attempt has ended without finishing."""
        if self.phase == "work":
            self._worked(time, None)
        else:
            self._spend({"start": "starting", "save": "saving"}[self.phase], time)
        broken = _interruption(event, self._at, reason, self.node, self.saved[0])
        self.broken.append(replace(broken, lost=self.dropped, attempt=self.attempt))
        self.phase, self.judged, self.stands, self.dropped = "wait", False, False, 0.0


def _place(event: Event) -> _Place:
    return int(event.get("step") or 0), int(event.get("part") or 0)


def _interruption(event: Event, time: float, reason: str, node: str, step: int = 0) -> Interruption:
    node = str(event.get("node") or event.get("host") or node)
    return Interruption(reason, time, node, max(step, int(event.get("step") or 0)))
