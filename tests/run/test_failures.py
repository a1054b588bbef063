"""How the end of an attempt is judged from the ledger, Slurm and the logs."""

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
NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or network error"
CUDA = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
ENGINE = "stages.grpo.rollout: vLLM failed: NCCL error: broken pipe"
TIME = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-01-02T12:00:00 DUE TO TIME LIMIT ***"
EXITED = "srun: error: node1: task 0: Exited with exit code 1\n"
KILLED = "srun: error: node2: task 1: Killed\n"
LAUNCHER = "srun: error: node2: task 1: Exited with exit code 1\n"


@dataclass
class FakeLogs:
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
STOPPED = event("requeued", reason="time limit", attempt="7-0")
REFUSED = event("failed", message="scontrol requeue: operation is disabled for job 7", exit_code=1, attempt="7-0")
PREEMPTED_BEFORE = event("requeued", attempt="7-0", reason="preempted")
AGAIN = event("started", attempt="7-1")
SEEN = event("failed", attempt="4711", message="rank 1 ended with exit code 2", exit_code=2, log="1_log.err")


@pytest.mark.parametrize(
    ("events", "job", "logs", "reason", "message", "node"),
    [
        # Slurm's state
        ([STARTED], ended_as("PREEMPTED", nodes="node1"), FakeLogs(), "preempted", "", "node1"),
        ([STARTED, failed(GLOO)], ended_as("TIMEOUT"), FakeLogs(), "time limit", "", ""),
        ([STARTED, failed(GLOO)], ended_as("NODE_FAIL", failed_node="node2"), FakeLogs(), "node failure", "",
         "node2"),
        ([STARTED, failed(NCCL)], ended_as("OUT_OF_MEMORY"), FakeLogs(), "killed for memory", "", ""),
        ([STARTED], ended_as("BOOT_FAIL"), FakeLogs(), "node failure", "", ""),
        ([STARTED], ended_as("DEADLINE"), FakeLogs(), "past its deadline", "", ""),
        ([event("submitted")], ended_as("CANCELLED"), FakeLogs(), "cancelled by hand", "", ""),
        # what slurmstepd wrote, if Slurm has forgotten the job
        ([STARTED], None, FakeLogs(TIME), "time limit", TIME, ""),
        ([STARTED], None, FakeLogs(TIME.replace("TIME LIMIT", "PREEMPTION")), "preempted", "*", ""),
        ([STARTED, failed(GLOO)], FAILED, FakeLogs("srun: error: Node failure on node2"), "node failure", "*",
         "node2"),
        # the ledger outweighs it
        ([STARTED, event("cancelled", attempt="7-0")], ended_as("CANCELLED"), FakeLogs(), "cancelled by hand",
         "", ""),
        ([STARTED, event("cancelled", attempt="7-0"), event("cancelled", job_id="7")], ended_as("CANCELLED"),
         FakeLogs(), "cancelled by hpc-rlhf", "", ""),
        ([STARTED, event("hang", message="rank 3 at step 9", host="node2"), failed(GLOO)], FAILED, FakeLogs(),
         "hang", "rank 3 at step 9", "node2"),
        ([STARTED, failed("data.json: no such file", 2)], FAILED, FakeLogs(), "user error",
         "data.json: no such file", ""),
        # also if another machine's launcher is heard first, or a rank that was stopped by its watchdog meanwhile
        ([STARTED, SEEN, failed("data.json: no such file", 2)], None, FakeLogs(), "user error",
         "data.json: no such file", ""),
        ([STARTED, failed("RuntimeError: no batch"), event("hang", message="rank 1"), failed("no such file", 2), SEEN],
         None, FakeLogs(), "user error", "no such file", ""),
        ([STARTED, SEEN, failed(GLOO)], None, FakeLogs(), "user error", "rank 1 ended with exit code 2", ""),
        # the cause of several failures, not the lost connections that followed
        ([STARTED, failed(GLOO, host="node1"), failed("ValueError: bad row", host="node2")], FAILED,
         FakeLogs(), "failed", "ValueError: bad row", "node2"),
        ([STARTED, failed(GLOO, host="node1"), failed(CUDA, host="node2")], FAILED, FakeLogs(),
         "out of memory", CUDA, "node2"),
        ([STARTED, failed(GLOO, host="node1")], FAILED, FakeLogs(), "NCCL or gloo error", GLOO, "node1"),
        ([STARTED, failed(NCCL)], FAILED, FakeLogs(), "NCCL or gloo error", NCCL, ""),
        ([STARTED, failed(GLOO, host="node1"), failed(ENGINE)], FAILED, FakeLogs(), "inference engine failed", ENGINE,
         ""),
        # torchrun and DeepSpeed's launcher, of which srun knows only the exit code
        ([STARTED, failed(GLOO, host="node1")], FAILED,
         FakeLogs(f"failed (exitcode: -9) local_rank: 0\n{LAUNCHER}"),
         "killed", "a rank was ended by SIGKILL", ""),
        ([STARTED], FAILED,
         FakeLogs("exits with return code = -9\nsrun: error: node2: task 1: Exited with exit code 247\n"),
         "killed", "a rank was ended by SIGKILL", ""),
        ([STARTED], FAILED,
         FakeLogs(f"failed (exitcode: 1) local_rank: 0\n{LAUNCHER}", {1: "not it"}),
         "failed", "a rank ended with exit code 1", "node2"),
        ([STARTED, failed(GLOO, host="node1")], FAILED, FakeLogs("srun: error: node2: task 1: Killed\n"),
         "killed", "srun: error: node2: task 1: Killed", "node2"),
        # srun kills the others when one has failed; but a closed connection shows a rank that died before
        ([STARTED, failed(NCCL)], FAILED,
         FakeLogs(f"{EXITED}{KILLED}"),
         "NCCL or gloo error", NCCL, ""),
        ([STARTED, failed(GLOO)], FAILED,
         FakeLogs(f"{EXITED}{KILLED}"),
         "killed", "srun: error: node2: task 1: Killed", "node2"),
        ([STARTED, failed(GLOO)], FAILED,
         FakeLogs(f"{KILLED}slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n"),
         "killed for memory", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.", ""),
        # a launcher noticed it
        ([STARTED, failed(GLOO), failed("rank 1 was ended by SIGKILL", killed=True)], None, FakeLogs(),
         "killed", "rank 1 was ended by SIGKILL", ""),
        # ranks that could not report anything
        ([event("submitted")], FAILED,
         FakeLogs("srun: error: node2: tasks 1-3: Exited with exit code 1", {1: "No module named x"}),
         "failed", "No module named x", "node2"),
        ([STARTED], FAILED, FakeLogs("srun: error: node2: task 1: Segmentation fault", {1: "step 8"}),
         "failed", "srun: error: node2: task 1: Segmentation fault", "node2"),
        ([STARTED], ended_as("FAILED", exit_code="0:9", nodes="node1"), FakeLogs(), "killed", "exit code 0:9",
         "node1"),
        ([event("submitted")], FAILED, FakeLogs("hpc-rlhf: setup failed at: module load cuda\n"), "failed",
         "hpc-rlhf: setup failed at: module load cuda", ""),
        ([STARTED], ended_as("COMPLETED", exit_code="0:0"), FakeLogs(), "failed", "Slurm reports COMPLETED",
         ""),
        ([STARTED], None, FakeLogs(), "failed", "it left no message", ""),
        # rank 1 failed before rank 0 wrote its first event
        ([event("retried"), failed("OSError: disk full"), STARTED, failed(GLOO)], FAILED, FakeLogs(),
         "failed", "OSError: disk full", ""),
        # a failure of the attempt before does not count
        ([event("requeued", attempt="7-0"), failed("scontrol: refused"), event("started", attempt="7-1")],
         FAILED, FakeLogs(), "failed", "Slurm reports FAILED", ""),
        # Slurm refuses to requeue a job that saved and stopped: the stage's own word counts, not the refusal
        ([STARTED, STOPPED, REFUSED], ended_as("FAILED", nodes="node1", restarts=0), FakeLogs(EXITED), "time limit", "",
         "node1"),
        ([STARTED, STOPPED, REFUSED], FAILED, FakeLogs(EXITED), "time limit", "", ""),
        ([STARTED, STOPPED], None, FakeLogs(EXITED), "time limit", "", ""),
        ([STARTED, event("requeued", reason="preempted", attempt="7-0"), REFUSED],
         ended_as("FAILED", restarts=0), FakeLogs(EXITED), "preempted", "", ""),
        # but not for a later attempt that failed before rank 0 wrote its first event
        ([STARTED, STOPPED], ended_as("FAILED", restarts=1), FakeLogs("No module named x"), "failed",
         "No module named x", ""),
        ([STARTED, STOPPED, event("failed", message="OSError: disk full", attempt="7-1")], FAILED, FakeLogs(), "failed",
         "OSError: disk full", ""),
        # no node is left without those that heal excluded; otherwise the stage requests too much
        ([STARTED, event("ended"), event("retried", without=["node1"])], ended_as("FAILED", reason="BadConstraints"),
         FakeLogs(), "no nodes left", "no node but those excluded has what the job requests (BadConstraints)", ""),
        ([event("submitted")], ended_as("FAILED", reason="BadConstraints"), FakeLogs(),
         "failed", "no node has what the job requests (BadConstraints)", ""),
        # from Slurm 26.05 on, srun sends the other ranks the signal of a preemption when one has failed
        ([STARTED, failed("ValueError: bad row", host="node2"), event("stopping", reason="preempted")],
         ended_as("PREEMPTED"), FakeLogs(), "failed", "ValueError: bad row", "node2"),
        # but ranks also lose each other when a job is preempted
        ([STARTED, failed(GLOO, host="node2")], ended_as("PREEMPTED"), FakeLogs(), "preempted", "", ""),
        # earlier attempts do not count
        ([STARTED, failed("old", 2), event("requeued", step=3)], ended_as("PREEMPTED"), FakeLogs(),
         "preempted", "", ""),
        # accounting does not show which attempt was preempted; from 24.05 on, it may have been an earlier one
        ([PREEMPTED_BEFORE, AGAIN, failed("ValueError: bad row")], ended_as("PREEMPTED"), FakeLogs(), "failed",
         "ValueError: bad row", ""),
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED"), FakeLogs(f"{KILLED}hpc-rlhf: ended with exit code 137"),
         "killed", KILLED.strip(), "node2"),
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED"), FakeLogs("hpc-rlhf: ended with exit code 3\n"), "failed",
         "hpc-rlhf: ended with exit code 3", ""),
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED"), FakeLogs("hpc-rlhf: ended with exit code 137"), "killed",
         "*", ""),
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED"), FakeLogs(TIME), "time limit", "*", ""),
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED"), FakeLogs("DUE TO PREEMPTION ***"), "preempted", "*", ""),
        # the controller does
        ([PREEMPTED_BEFORE, AGAIN], ended_as("PREEMPTED", restarts=1), FakeLogs(), "preempted", "", ""),
        # another job's preemption marks nothing
        ([event("requeued", attempt="6-0", reason="preempted"), STARTED], ended_as("PREEMPTED"), FakeLogs(),
         "preempted", "", ""),
    ],
)  # fmt: skip
def test_reason_message_and_node(
    events: list[Event], job: JobRecord | None, logs: FakeLogs, reason: str, message: str, node: str
) -> None:
    ending = judge(StageHistory(events), job, logs, 9)
    assert (ending.reason, ending.node, ending.step) == (reason, node, 9)
    assert ending.message == (logs.batch if message == "*" else message)


def test_a_long_message_is_shortened_to_one_line() -> None:
    ending = judge(StageHistory([STARTED, failed("first\nsecond " + "x" * 1000, 2)]), None, FakeLogs(), 1)
    assert ending.message.startswith("first second xxx")
    assert len(ending.message) == 300


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ("DUE TO PREEMPTION ***", "preempted"),
        ("hpc-rlhf: preempted before the ranks were up: requeued", "preempted"),
        ("hpc-rlhf: preempted before the ranks were up: requeued\nCANCELLED DUE TO JOB REQUEUE ***", "preempted"),
        ("DUE TO JOB REQUEUE ***", "requeued by hand"),
        ("", "node failure"),
    ],
)
def test_a_requeue_by_slurm_is_not_blamed_on_the_stage(batch: str, reason: str) -> None:
    ending = judge_requeued(StageHistory([event("started", host="n1"), failed(GLOO)]), "7", FakeLogs(batch), 3)
    assert (ending.reason, ending.node) == (reason, "" if batch else "n1")


ITSELF = "hpc-rlhf: ended with exit code 1\n"


@pytest.mark.parametrize(
    ("events", "batch", "reason", "message"),
    [
        ([PREEMPTED_BEFORE, AGAIN, failed("ValueError: bad row")], ITSELF, "failed", "ValueError: bad row"),
        ([PREEMPTED_BEFORE, AGAIN, failed("ValueError: bad row")], "", "failed", "ValueError: bad row"),
        ([PREEMPTED_BEFORE, AGAIN, failed("no such file", 2)], ITSELF, "user error", "no such file"),
        ([PREEMPTED_BEFORE, AGAIN, event("hang", message="rank 3")], ITSELF, "hang", "rank 3"),
        ([PREEMPTED_BEFORE, AGAIN], KILLED + ITSELF, "killed", KILLED.strip()),
        ([PREEMPTED_BEFORE, AGAIN, failed(GLOO)], ITSELF, "NCCL or gloo error", GLOO),
        # it was preempted just now, and ended by itself in the grace
        ([STARTED, failed(GLOO)], ITSELF, "preempted", ""),
    ],
)
def test_a_failure_that_slurm_requeued_because_of_an_earlier_preemption_is_one(
    events: list[Event], batch: str, reason: str, message: str
) -> None:
    ending = judge_requeued(StageHistory(events), "7", FakeLogs(batch), 3)
    assert (ending.reason, ending.message) == (reason, message)
