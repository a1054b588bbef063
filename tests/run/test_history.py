"""What a stage's history answers from its events."""

from __future__ import annotations

from itertools import chain, permutations

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
        ([STARTED, saved(5), event("ended"), STARTED, event("saved", step=5, part=2)], True),
    ],
)
def test_progress_is_a_new_place_on_disk(events: list[Event], expected: bool) -> None:
    assert StageHistory(events).has_progress is expected


def test_requeues_are_counted_since_the_user_last_submitted() -> None:
    sent, again = event("submitting"), event("submitting", by="heal")
    one = [sent, STARTED, event("requeued"), STARTED, event("ended"), event("retried")]
    assert StageHistory(one).since_user.requeues == 2  # the last has not started yet
    assert StageHistory([*one, again, STARTED, STARTED]).since_user.requeues == 3  # once Slurm requeued it by itself
    assert StageHistory([*one, event("anew"), event("retried"), STARTED]).since_user.requeues == 0
    assert StageHistory([*one, sent, STARTED]).since_user.requeues == 0
    refused = [event("requeued"), event("failed"), event("ended"), again, event("submitted"), event("retried"), STARTED]
    assert StageHistory([sent, STARTED, *refused, *refused]).since_user.requeues == 2  # not four


REPORTED = event("failed", message="OSError: disk full", exit_code=1)
LOST = event("failed", message="RuntimeError: connection closed", exit_code=1)
MISTAKE = event("failed", message="data.json: no such file", exit_code=2)
SEEN = event("failed", message="the launcher of rank 1 ended with exit code 1", log="1.err")
KILLED = event("failed", message="rank 1 was ended by SIGKILL", log="1.err", killed=True)


@pytest.mark.parametrize(
    ("causes", "consequences"),
    [
        ([MISTAKE], [REPORTED, LOST, SEEN, KILLED]),
        ([REPORTED], [LOST, SEEN]),
        ([KILLED], [LOST, SEEN]),
        ([SEEN], [LOST]),
        ([REPORTED, KILLED], [LOST, SEEN]),  # of two causes the first
        ([KILLED, REPORTED], [LOST, SEEN]),
    ],
)
def test_the_first_cause_does_not_depend_on_who_is_heard_first(causes: list[Event], consequences: list[Event]) -> None:
    for order in permutations([causes, *([each] for each in consequences)]):
        assert StageHistory([STARTED, *chain.from_iterable(order)]).first_cause == causes[0]
