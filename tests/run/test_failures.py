"""How an ending is told from what the ledger, Slurm and the logs say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from hpc_rlhf.run.events import Event
from hpc_rlhf.run.failures import judge, judge_requeued
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.slurm.jobs import JobRecord
from tests.ledger_events import event

GLOO = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"
NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error"
CUDA = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
TIME = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-01-02T12:00:00 DUE TO TIME LIMIT ***"


@dataclass
class Said:
    """The logs of an attempt."""

    batch: str = ""
    ranks: dict[int, str] = field(default_factory=dict)

    def last_line(self, rank: int) -> str:
        return self.ranks.get(rank, "")


def failed(message: str, code: int = 1, **facts: Any) -> Event:
    return event("failed", message=message, exit_code=code, attempt="7-0", **facts)


def ended_as(state: str, **facts: Any) -> JobRecord:
    return JobRecord("7", state, facts.pop("exit_code", "1:0"), **facts)


FAILED = ended_as("FAILED", nodes="node[1-2]")
STARTED = event("started", attempt="7-0")


@pytest.mark.parametrize(
    ("events", "job", "logs", "reason", "message", "node"),
    [
        # Slurm's word
        ([STARTED], ended_as("PREEMPTED", nodes="node1"), Said(), "preempted", "", "node1"),
        ([STARTED, failed(GLOO)], ended_as("TIMEOUT"), Said(), "time limit", "", ""),
        ([STARTED, failed(GLOO)], ended_as("NODE_FAIL", failed_node="node2"), Said(), "node failure", "", "node2"),
        ([STARTED, failed(NCCL)], ended_as("OUT_OF_MEMORY"), Said(), "killed for memory", "", ""),
        ([STARTED], ended_as("BOOT_FAIL"), Said(), "node failure", "", ""),
        ([STARTED], ended_as("DEADLINE"), Said(), "past its deadline", "", ""),
        ([event("submitted")], ended_as("CANCELLED"), Said(), "cancelled by hand", "", ""),
        # what slurmstepd said, where Slurm has forgotten the job
        ([STARTED], None, Said(TIME), "time limit", TIME, ""),
        ([STARTED], None, Said(TIME.replace("TIME LIMIT", "PREEMPTION")), "preempted", "*", ""),
        ([STARTED, failed(GLOO)], FAILED, Said("srun: error: Node failure on node2"), "node failure", "*", "node2"),
        # what the ledger says outweighs it
        ([STARTED, event("cancelled", attempt="7-0")], ended_as("CANCELLED"), Said(), "cancelled by hand", "", ""),
        ([STARTED, event("cancelled", attempt="7-0"), event("cancelled", job_id="7")], ended_as("CANCELLED"), Said(),
         "cancelled by hpc-rlhf", "", ""),
        ([STARTED, event("hang", message="rank 3 at step 9", host="node2"), failed(GLOO)], FAILED, Said(),
         "hang", "rank 3 at step 9", "node2"),
        ([STARTED, failed("data.json: no such file", 2)], FAILED, Said(), "user error", "data.json: no such file", ""),
        # of several failures the cause, not that ranks lost touch with each other
        ([STARTED, failed(GLOO, host="node1"), failed("ValueError: bad row", host="node2")], FAILED, Said(),
         "failed", "ValueError: bad row", "node2"),
        ([STARTED, failed(GLOO, host="node1"), failed(CUDA, host="node2")], FAILED, Said(), "out of memory", CUDA, "node2"),
        ([STARTED, failed(GLOO, host="node1")], FAILED, Said(), "NCCL or gloo error", GLOO, "node1"),
        ([STARTED, failed(NCCL)], FAILED, Said(), "NCCL or gloo error", NCCL, ""),
        # torchrun and DeepSpeed's launcher, of which srun knows only the code that they end with.
        ([STARTED, failed(GLOO, host="node1")], FAILED,
         Said("failed (exitcode: -9) local_rank: 0\nsrun: error: node2: task 1: Exited with exit code 1\n"),
         "killed", "a rank was ended by SIGKILL", ""),
        ([STARTED], FAILED,
         Said("exits with return code = -9\nsrun: error: node2: task 1: Exited with exit code 247\n"),
         "killed", "a rank was ended by SIGKILL", ""),
        ([STARTED], FAILED,
         Said("failed (exitcode: 1) local_rank: 0\nsrun: error: node2: task 1: Exited with exit code 1\n", {1: "not it"}),
         "failed", "a rank ended with exit code 1", "node2"),
        ([STARTED, failed(GLOO, host="node1")], FAILED, Said("srun: error: node2: task 1: Killed\n"), "killed",
         "srun: error: node2: task 1: Killed", "node2"),
        # srun kills the others when one has failed; but a connection that the other end closed tells of a rank that died before
        ([STARTED, failed(NCCL)], FAILED,
         Said("srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Killed\n"),
         "NCCL or gloo error", NCCL, ""),
        ([STARTED, failed(GLOO)], FAILED,
         Said("srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Killed\n"),
         "killed", "srun: error: node2: task 1: Killed", "node2"),
        ([STARTED, failed(GLOO)], FAILED,
         Said("srun: error: node2: task 1: Killed\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n"),
         "killed for memory", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.", ""),
        # a launcher saw it
        ([STARTED, failed(GLOO), failed("rank 1 was ended by SIGKILL", killed=True)], None, Said(), "killed",
         "rank 1 was ended by SIGKILL", ""),
        # ranks that could say nothing
        ([event("submitted")], FAILED, Said("srun: error: node2: tasks 1-3: Exited with exit code 1", {1: "No module named x"}),
         "failed", "No module named x", "node2"),
        ([STARTED], FAILED, Said("srun: error: node2: task 1: Segmentation fault", {1: "step 8"}),
         "failed", "srun: error: node2: task 1: Segmentation fault", "node2"),
        ([STARTED], ended_as("FAILED", exit_code="0:9", nodes="node1"), Said(), "killed", "exit code 0:9", "node1"),
        ([event("submitted")], FAILED, Said("hpc-rlhf: setup failed at: module load cuda\n"),
         "failed", "hpc-rlhf: setup failed at: module load cuda", ""),
        ([STARTED], ended_as("COMPLETED", exit_code="0:0"), Said(), "failed", "Slurm reports COMPLETED", ""),
        ([STARTED], None, Said(), "failed", "it left no message", ""),
        # rank 1 failed before rank 0 came to its first word
        ([event("retried"), failed("OSError: disk full"), STARTED, failed(GLOO)], FAILED, Said(), "failed", "OSError: disk full", ""),
        # a failure of the attempt before is none of this one's
        ([event("requeued", attempt="7-0"), failed("scontrol: refused"), event("started", attempt="7-1")], FAILED, Said(), "failed",
         "Slurm reports FAILED", ""),
        # from Slurm 26.05 on, srun sends the other ranks the signal of a preemption when one has failed
        ([STARTED, failed("ValueError: bad row", host="node2"), event("stopping", reason="preempted", attempt="7-0")],
         ended_as("PREEMPTED"), Said(), "failed", "ValueError: bad row", "node2"),
        # but ranks also lose each other as a job is preempted
        ([STARTED, failed(GLOO, host="node2")], ended_as("PREEMPTED"), Said(), "preempted", "", ""),
        # an attempt before is over and done with
        ([STARTED, failed("old", 2), event("requeued", step=3)], ended_as("PREEMPTED"), Said(), "preempted", "", ""),
    ],
)  # fmt: skip
def test_reason_line_and_node(
    events: list[Event], job: JobRecord | None, logs: Said, reason: str, message: str, node: str
) -> None:
    ending = judge(StageHistory(events), job, logs, 9)
    assert (ending.reason, ending.node, ending.step) == (reason, node, 9)
    assert ending.message == (logs.batch if message == "*" else message)


def test_a_long_message_is_one_line_of_a_table() -> None:
    ending = judge(StageHistory([STARTED, failed("first\nsecond " + "x" * 1000, 2)]), None, Said(), 1)
    assert ending.message.startswith("first second xxx")
    assert len(ending.message) == 300


@pytest.mark.parametrize(
    ("said", "reason"),
    [("DUE TO PREEMPTION ***", "preempted"), ("hpc-rlhf: preempted before the ranks were up: requeued", "preempted"), ("hpc-rlhf: preempted before the ranks were up: requeued\nCANCELLED DUE TO JOB REQUEUE ***", "preempted"), ("DUE TO JOB REQUEUE ***", "requeued by hand"), ("", "node failure")],
)  # fmt: skip
def test_what_slurm_requeued_by_itself_failed_for_no_fault_of_its_own(said: str, reason: str) -> None:
    ending = judge_requeued(StageHistory([event("started", host="n1"), failed(GLOO)]), Said(said), 3)
    assert (ending.reason, ending.node) == (reason, "" if said else "n1")
