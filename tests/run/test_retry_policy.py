"""Whether, when and where a stage is retried."""

from __future__ import annotations

import pytest

from hpc_rlhf.run.events import Ended, Event, Requeued
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.retry_policy import Retry, Stop, StopKind, decide
from tests.ledger_events import event


def ended(reason: str, step: int = 0, progress: bool = False, node: str = "", message: str = "") -> Ended:
    message = message or f"how it {reason}"
    return Ended(reason=reason, step=step, progress=progress, node=node, message=message)


STARTED, RETRIED = event("started"), event("retried")
LOST = ended("node failure", node="n1")
IN_VAIN = "two attempts in a row hit the time limit before they could save anything new, the last one at step"
MORE_TIME = "raise slurm.time, or make a step shorter: a smaller global batch, shorter responses, or more GPUs"


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ([ended("time limit", 9, progress=True)], Retry()),
        ([ended("time limit", 9, progress=True)] * 3, Retry()),  # in parts of a long step
        ([ended("failed", 9, progress=True)], Retry()),
        ([ended("killed", 9)], Retry(10)),
        ([ended("preempted"), ended("preempted"), ended("preempted")], Retry(160)),  # not the stage's fault
        ([LOST, ended("killed for memory", 3, node="n1")], Retry(40, ("n1",))),
        ([LOST, ended("node failure", node="n2")], Retry(40)),
        ([LOST, LOST, *(ended("killed", n, True, f"n{n}") for n in (2, 3, 4))], Retry()),  # that was long ago
        (
            [ended("time limit", 3, node="n1"), ended("failed", 9, True, "n1")],
            Retry(),
        ),  # a time limit is not a node's fault
        ([ended("preempted")] * 9, Retry(3600)),
        ([LOST, LOST, ended("no nodes left")], Retry(160)),
        # the same failure twice at the same step; at another step, or another failure, it may be chance
        ([ended("failed", 7, True), ended("failed", 7)], "failed twice at step 7: how it failed"),
        (
            [ended("out of memory", 7, True, "n1"), LOST, ended("out of memory", 7, node="n2")],
            "out of memory twice at step 7: how it out of memory",
        ),
        (
            [ended("failed", 7, True, message="port 4711 at 0x7f"), ended("failed", 7, message="port 80 at 0x1")],
            "failed twice at step 7: port 80 at 0x1",
        ),
        ([ended("failed", 7, True, message="disk full"), ended("failed", 7, message="bad row")], Retry(10)),
        ([ended("killed", 7, True), ended("killed", 8)], Retry(10)),
        # without progress
        ([ended("time limit", 5), ended("time limit", 6)], f"{IN_VAIN} 6: {MORE_TIME}"),
        ([ended("time limit", 5), ended("preempted", 5), ended("time limit", 5)], f"{IN_VAIN} 5: {MORE_TIME}"),
        ([ended("time limit", 5), ended("preempted", 6, True), ended("time limit", 6)], Retry(10)),
        (
            [ended("killed", 5), ended("hang", 6)],
            "two attempts in a row saved no new step; the last one ended at step 6 by: hang: how it hang",
        ),
        ([ended("time limit", 5), ended("time limit", 9, True), ended("time limit", 10)], Retry(10)),
        # another attempt would not help
        ([ended("user error", message="data.json: no such file")], "user error: data.json: no such file"),
        ([ended("cancelled by hand", message=" ")], "cancelled by hand:  "),
        # the budget
        (
            [
                STARTED,
                ended("preempted"),
                RETRIED,
                STARTED,
                ended("preempted"),
                RETRIED,
                STARTED,
                ended("preempted", 4, True),
                RETRIED,
                STARTED,
                ended("preempted", 8, True),
            ],
            "it was requeued 3 times, all that slurm.max_requeues allows; the last attempt ended by: "
            "preempted: how it preempted",
        ),
    ],
)
def test_decisions(window: list[Event], expected: Retry | str) -> None:
    verdict = decide(StageHistory(window), max_requeues=3, backoff=10)
    assert (verdict.message if isinstance(verdict, Stop) else verdict) == expected


FAILED = ended("failed", 7)


@pytest.mark.parametrize(
    ("last", "max_requeues", "kind"),
    [
        ([ended("user error")], 0, StopKind.USER_ERROR),
        ([ended("cancelled by hand")], 0, StopKind.FINAL),
        ([ended("time limit", 5), ended("time limit", 6)], 0, StopKind.TIME_LIMIT_WITHOUT_PROGRESS),
        ([FAILED, FAILED], 0, StopKind.SAME_FAILURE_TWICE),
        ([FAILED, ended("killed", 7)], 0, StopKind.NO_PROGRESS),
        ([ended("preempted")], 0, StopKind.BUDGET_SPENT),
        ([FAILED], 0, StopKind.BUDGET_SPENT),
    ],
)
def test_a_stop_has_the_kind_of_its_rule_however_many_requeues_are_left(
    last: list[Event], max_requeues: int, kind: StopKind
) -> None:
    verdict = decide(StageHistory(last), max_requeues)
    assert isinstance(verdict, Stop)
    assert verdict.kind is kind


@pytest.mark.parametrize(
    ("window", "reason", "kind"),
    [
        ([STARTED, RETRIED, STARTED], "preempted", None),
        ([STARTED, RETRIED, STARTED, RETRIED, STARTED], "preempted", StopKind.BUDGET_SPENT),
        ([STARTED, ended("time limit", 3), RETRIED, STARTED], "time limit", StopKind.TIME_LIMIT_WITHOUT_PROGRESS),
        # a part of a step was saved since
        ([STARTED, ended("time limit", 3), RETRIED, STARTED, event("saved", step=3, part=2)], "time limit", None),
    ],
)
def test_an_attempt_that_stops_by_itself_follows_the_same_rules(
    window: list[Event], reason: str, kind: StopKind | None
) -> None:
    verdict = decide(StageHistory(window), 2, stopping=Requeued(step=3, reason=reason))
    assert (verdict.kind if isinstance(verdict, Stop) else None) is kind
