"""What a stage's history answers from its events."""

from __future__ import annotations

import pytest

from hpc_rlhf.run.events import Event
from hpc_rlhf.run.history import StageHistory
from tests.ledger_events import event

STARTED = event("started", attempt="7-0")


def saved(step: int) -> Event:
    return event("saved", step=step)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([STARTED], False),
        ([STARTED, saved(5)], True),
        ([STARTED, saved(5), event("ended"), STARTED, event("resumed", step=5)], False),
        ([STARTED, saved(5), event("ended"), STARTED, saved(5)], False),  # the newest was damaged, and saved again
        ([STARTED, event("ended"), STARTED, saved(5), event("requeued"), STARTED], True),
    ],
)
def test_progress_is_a_new_step_on_disk(events: list[Event], expected: bool) -> None:
    assert StageHistory(events).has_progress is expected


def test_requeues_are_counted_since_the_user_last_submitted() -> None:
    sent, again = event("submitting"), event("submitting", by="heal")
    one = [sent, STARTED, event("requeued"), STARTED, event("ended"), event("retried")]
    assert StageHistory(one).since_user.requeues == 2  # the last has not started yet
    assert StageHistory([*one, again, STARTED, STARTED]).since_user.requeues == 3  # once Slurm requeued it by itself
    assert StageHistory([*one, event("anew"), event("retried"), STARTED]).since_user.requeues == 0
    assert StageHistory([*one, sent, STARTED]).since_user.requeues == 0
