"""The history of a stage: its ledger events folded into answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hpc_rlhf.run.events import (
    Cancelled,
    Ended,
    Event,
    Failed,
    Finished,
    Interrupted,
    Refused,
    Requeued,
    Resumed,
    Retried,
    RetryRequested,
    Saved,
    Started,
    Stopped,
    Submitted,
    Submitting,
)
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.reasons import TIME_LIMIT, is_consequence

E = TypeVar("E", bound=Event)

# Events after which nothing happens by itself. Of these, a failure may still be retried.
OUTCOMES = (Finished, Failed, Interrupted, Cancelled, Refused, Ended, Stopped)
RETRYABLE = (Failed, Ended)
_STATES = (*OUTCOMES, Submitting, Submitted, Started, Retried, RetryRequested)


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
        """The part after the first ``count`` events."""
        return StageHistory(self.events[count:])

    # Parts

    @property
    def attempt(self) -> StageHistory:
        """The part since the latest attempt began."""
        starts = (Started, Submitted, Retried, Requeued)
        begin = max((at for at, event in enumerate(self.events) if isinstance(event, starts)), default=0)
        # A rank may fail before rank 0 writes its first event.
        while (
            begin
            and isinstance(self.events[begin], (Started, Failed))
            and _same_attempt(self.events[begin - 1], self.events[begin])
        ):
            begin -= 1
        return self.after(begin)

    @property
    def since_user(self) -> StageHistory:
        """The part since the user last submitted the stage or asked for another attempt."""
        by_user = [
            at
            for at, event in enumerate(self.events)
            if isinstance(event, RetryRequested) or (isinstance(event, Submitting) and event.by != "heal")
        ]
        return self.after(by_user[-1]) if by_user else self

    # State

    @property
    def state(self) -> Event | None:
        """The last event that changed the stage's state. Late events of a cancelled job do not."""
        state: Event | None = None
        for event in self.events:
            late = isinstance(state, Cancelled) and isinstance(event, OUTCOMES)
            if isinstance(event, _STATES) and not late:
                state = event
        return state

    @property
    def is_stopped(self) -> bool:
        """Whether the stage was left to the user, and still is."""
        return isinstance(self.last(Stopped, RetryRequested, Retried, Submitting, Started), Stopped)

    @property
    def job_id(self) -> str | None:
        """The stage's Slurm job; None if it was never submitted, or was started without Slurm since."""
        job_id = None
        for event in self.events:
            if isinstance(event, Submitted):
                job_id = event.job_id
            elif isinstance(event, Started) and event.job_id != job_id:
                job_id = None
        return job_id

    def token(self, job_id: str) -> str | None:
        """The token with which a job was submitted."""
        tokens = [event.token for event in self.all(Submitted) if event.job_id == job_id]
        return tokens[-1] if tokens else None

    # Failures

    @property
    def first_cause(self) -> Failed | None:
        """The failure that explains the others: the first that is not a lost connection, or just the first."""
        failures = self.all(Failed)
        causes = [failure for failure in failures if not is_consequence(failure.message)]
        return next(iter(causes or failures), None)

    @property
    def requeues(self) -> int:
        """How often the stage was requeued. Attempts that never got to their first event count too."""
        # One `retried` event was the user's request.
        by_user = 1 if self.events and isinstance(self.events[0], RetryRequested) else 0
        submitted_again = len(self.all(Requeued)) + len(self.all(Retried)) - by_user
        return max(len(self.all(Started)) - 1, submitted_again)

    @property
    def timeouts_without_progress(self) -> int:
        """How many attempts in a row hit the time limit without saving anything new.

        Attempts that ended for another reason are skipped, but what they saved counts.
        """
        count, requeued = 0, False
        furthest = mark = (0, 0)  # the last place saved, and the same when the attempt before ended
        for event in self.events:
            if isinstance(event, Saved):
                furthest = max(furthest, event.place)
            elif isinstance(event, Resumed):
                mark, furthest = max(mark, event.place), max(furthest, event.place)
            elif isinstance(event, Started):
                requeued = False
            elif isinstance(event, (Requeued, Ended)):
                if furthest > mark or (isinstance(event, Ended) and event.progress):
                    count = 0
                elif event.reason == TIME_LIMIT and not requeued:
                    count += 1
                mark, requeued = furthest, isinstance(event, Requeued)
        return count

    @property
    def has_progress(self) -> bool:
        """Whether a step was saved since the last `ended` that is later than all saved before it."""
        ends = [at for at, event in enumerate(self.events) if isinstance(event, Ended)]
        since = ends[-1] if ends else 0
        before, after = (
            max((event.step for event in part if isinstance(event, Saved)), default=0)
            for part in (self.events[:since], self.events[since:])
        )
        return after > before


def _same_attempt(before: Event, event: Event) -> bool:
    """Whether one event is a failure in the attempt of another. Without Slurm, ranks that have not met yet
    may name their attempt differently."""
    names = [getattr(each, "attempt", "") for each in (before, event)]
    same = names[0] == names[1] or all(name.startswith("local-") for name in names)
    return isinstance(before, Failed) and same
