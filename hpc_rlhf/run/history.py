"""The history of a stage: its ledger events folded into answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from hpc_rlhf.errors import INPUT_WRONG
from hpc_rlhf.run import events
from hpc_rlhf.run.events import Event, Failed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.reasons import TIME_LIMIT, is_consequence

E = TypeVar("E", bound=Event)

# Events after which nothing happens by itself. Of these, a failure may still be retried.
OUTCOMES = (events.Finished, Failed, events.Interrupted, events.Cancelled, events.Refused, events.Ended, events.Stopped)
RETRYABLE = (Failed, events.Ended)
_AGAIN = (events.Requeued, events.Retried)
_STATES = (*OUTCOMES, events.Submitting, events.Submitted, events.Started, events.Retried, events.RetryRequested)


@dataclass(frozen=True)
class StageHistory:
    """A stage's events, or a part of them, in the order written, which counts more than machines' clocks."""

    events: Sequence[Event] = ()

    @classmethod
    def read(cls, run: RunDir, stage: str) -> StageHistory:
        return cls(tuple(Ledger(run.ledger).events(stage)))

    def all(self, kind: type[E]) -> list[E]:
        """The events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def last(self, *kinds: type[E]) -> E | None:
        """The last event of some kinds."""
        return next((event for event in reversed(self.events) if isinstance(event, kinds)), None)

    def after(self, count: int) -> StageHistory:
        """The part without the first ``count`` events."""
        return StageHistory(self.events[count:])

    # Parts

    @property
    def attempt(self) -> StageHistory:
        """The part since the latest attempt began."""
        starts = (events.Started, events.Submitted, events.Retried, events.Requeued)
        begin = max((at for at, event in enumerate(self.events) if isinstance(event, starts)), default=0)
        # A rank may fail before rank 0 writes its first event.
        while (
            begin
            and isinstance(self.events[begin], (events.Started, Failed))
            and _same_attempt(self.events[begin - 1], self.events[begin])
        ):
            begin -= 1
        return self.after(begin)

    @property
    def since_user(self) -> StageHistory:
        """The part since the user last submitted the stage or asked for another attempt."""
        begin = 0
        for at, event in enumerate(self.events):
            submitted = isinstance(event, events.Submitting) and event.by != "heal"
            if submitted or isinstance(event, events.RetryRequested):
                begin = at
        return self.after(begin)

    # State

    @property
    def state(self) -> Event | None:
        """The last event that changed the stage's state. Late events of a cancelled job do not."""
        state: Event | None = None
        for event in self.events:
            late = isinstance(state, events.Cancelled) and isinstance(event, OUTCOMES)
            if isinstance(event, _STATES) and not late:
                state = event
        return state

    @property
    def is_stopped(self) -> bool:
        """Whether the stage was left to the user, and still is."""
        begun = (events.RetryRequested, events.Retried, events.Submitting, events.Started)
        return isinstance(self.last(events.Stopped, *begun), events.Stopped)

    @property
    def job_id(self) -> str | None:
        """The stage's Slurm job; None if it was never submitted, or was since started without Slurm or
        relocated."""
        job_id = None
        for event in self.events:
            if isinstance(event, events.Submitted):
                job_id = event.job_id
            elif isinstance(event, events.Relocated) or (isinstance(event, events.Started) and event.job_id != job_id):
                job_id = None
        return job_id

    def token(self, job_id: str) -> str | None:
        """The token with which a job was submitted."""
        tokens = [event.token for event in self.all(events.Submitted) if event.job_id == job_id]
        return tokens[-1] if tokens else None

    # Failures

    @property
    def first_cause(self) -> Failed | None:
        """The failure that explains the others: a user's mistake, then any other failure but a lost connection.
        Reports of ranks come before what a supervisor saw, their exit codes; of equals the first counts."""
        return min(self.all(Failed), key=_distance, default=None)

    @property
    def requeues(self) -> int:
        """How often the stage was requeued. Attempts that never got to their first event count too."""
        # One `retried` event was the user's request.
        by_user = 1 if self.events and isinstance(self.events[0], events.RetryRequested) else 0
        # A stage whose request Slurm refuses is submitted again: one of them, not two.
        kinds = [type(each) for each in self.events if isinstance(each, (events.Started, *_AGAIN))]
        refused = sum(pair == _AGAIN for pair in pairwise(kinds))
        submitted_again = len(self.all(events.Requeued)) + len(self.all(events.Retried)) - refused - by_user
        return max(len(self.all(events.Started)) - 1, submitted_again)

    @property
    def timeouts_without_progress(self) -> int:
        """How many attempts in a row hit the time limit without saving anything new.

        Attempts that ended for another reason are skipped, but what they saved counts.
        """
        count, requeued = 0, False
        furthest = mark = (0, 0)  # the last place saved, and the same when the attempt before ended
        for event in self.events:
            if isinstance(event, events.Saved):
                furthest = max(furthest, event.place)
            elif isinstance(event, events.Resumed):
                mark, furthest = max(mark, event.place), max(furthest, event.place)
            elif isinstance(event, events.Started):
                requeued = False
            elif isinstance(event, (events.Requeued, events.Ended)):
                if furthest > mark or (isinstance(event, events.Ended) and event.progress):
                    count = 0
                elif event.reason == TIME_LIMIT and not requeued:
                    count += 1
                mark, requeued = furthest, isinstance(event, events.Requeued)
        return count

    @property
    def has_progress(self) -> bool:
        """Whether a place was saved since the last `ended` that is later than all saved before it."""
        furthest, progress = (0, 0), False
        for event in self.events:
            if isinstance(event, events.Ended):
                progress = False
            elif isinstance(event, events.Saved) and event.place > furthest:
                furthest, progress = event.place, True
        return progress


def _distance(failed: Failed) -> tuple[bool, bool, bool]:
    """How far a failure is from the cause. The order of the events does not show it: machines' launchers end in any
    order, so one that has only an exit code may write before the rank that knows why."""
    seen_from_outside = bool(failed.log) and not failed.killed
    return failed.exit_code != INPUT_WRONG, is_consequence(failed.message), seen_from_outside


def _same_attempt(before: Event, event: Event) -> bool:
    """Whether one event is a failure in the attempt of another. Without Slurm, ranks that have not met yet
    may name their attempt differently."""
    names = [getattr(each, "attempt", "") for each in (before, event)]
    same = names[0] == names[1] or all(name.startswith("local-") for name in names)
    return isinstance(before, Failed) and same
