"""Whether, when and where a stage is tried again."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rlhf.launch.retry_policy import Again, Stop, decide


def ended(
    reason: str, step: int = 0, progress: bool = False, node: str = "", message: str = ""
) -> dict[str, Any]:
    return {
        "event": "ended", "reason": reason, "step": step, "progress": progress, "node": node,
        "message": message or f"how it {reason}",
    }  # fmt: skip


STARTED = {"event": "started"}
RETRIED = {"event": "retried"}
LOST = ended("node failure", node="n1")


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ([ended("time limit", 9, progress=True)], Again(0)),
        ([ended("failed", 9, progress=True)], Again(0)),
        ([ended("killed", 9)], Again(10)),
        ([ended("preempted"), ended("preempted"), ended("preempted")], Again(160)),  # no fault of the stage
        ([LOST, ended("killed for memory", 3, node="n1")], Again(40, ("n1",))),
        ([LOST, ended("node failure", node="n2")], Again(40)),
        ([LOST, LOST, *(ended("killed", n, True, f"n{n}") for n in (2, 3, 4))], Again(0)),  # that was long ago
        ([ended("time limit", 3, node="n1"), ended("failed", 9, True, "n1")], Again(0)),  # limits are no node's
        ([ended("preempted")] * 9, Again(3600)),
        # the same twice at the same step; but at another, or in another way, it may be chance
        ([ended("failed", 7, True), ended("failed", 7)], "failed twice at step 7: how it failed"),
        ([ended("out of memory", 7, True, "n1"), LOST, ended("out of memory", 7, node="n2")], "out of memory twice at step 7: how it out of memory"),
        ([ended("failed", 7, True, message="port 4711 at 0x7f"), ended("failed", 7, message="port 80 at 0x1")], "failed twice at step 7: port 80 at 0x1"),
        ([ended("failed", 7, True, message="disk full"), ended("failed", 7, message="bad row")], Again(10)),
        ([ended("killed", 7, True), ended("killed", 8)], Again(10)),
        # in vain
        ([ended("time limit", 5), ended("time limit", 6)],
         "two attempts in a row came to the time limit before they could save anything new, the last one at step 6: "
         "raise slurm.time, or make a step shorter: a smaller global batch, shorter answers, or more GPUs"),
        ([ended("time limit", 5), ended("preempted", 5), ended("time limit", 5)],
         "two attempts in a row came to the time limit before they could save anything new, the last one at step 5: "
         "raise slurm.time, or make a step shorter: a smaller global batch, shorter answers, or more GPUs"),
        ([ended("time limit", 5), ended("preempted", 6, True), ended("time limit", 6)], Again(10)),
        ([ended("killed", 5), ended("hang", 6)],
         "two attempts in a row saved no new step; the last one ended at step 6 by: hang: how it hang"),
        ([ended("time limit", 5), ended("time limit", 9, True), ended("time limit", 10)], Again(10)),
        # what no other attempt would change
        ([ended("user error", message="data.json: no such file")], "user error: data.json: no such file"),
        ([ended("cancelled by hand", message=" ")], "cancelled by hand:  "),
        # the budget
        ([STARTED, ended("preempted"), RETRIED, STARTED, ended("preempted"), RETRIED, STARTED, ended("preempted", 4, True), RETRIED, STARTED, ended("preempted", 8, True)],
         "it was requeued 3 times, all that slurm.max_requeues allows; the last attempt ended by: preempted: how it preempted"),
    ],
)  # fmt: skip
def test_decisions(window: list[dict[str, Any]], expected: Again | str) -> None:
    wanted = Stop(expected) if isinstance(expected, str) else expected
    assert decide(window, max_requeues=3, backoff=10) == wanted
