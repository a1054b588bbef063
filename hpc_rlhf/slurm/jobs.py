"""Jobs as Slurm reports them, parsed from the output of squeue, sacct and scontrol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hpc_rlhf.slurm.durations import seconds

# squeue shows a finished job for a few minutes (MinJobAge); in these states it has ended for good.
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
})  # fmt: skip
_NOTHING = ("None", "(null)")
QUEUE_FORMAT = "%i|%T|%r|%E|%j|%k"
ACCOUNTING_FORMAT = "JobID,State,ExitCode,NodeList"


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it.

    Attributes:
        job_id: its number.
        name: its name.
        state: Slurm's state, such as PENDING.
        reason: why it is pending or ended; empty otherwise.
        comment: its comment.
        dependency: what it waits for, as squeue writes it; empty if it waits for no other job.
    """

    job_id: str
    name: str
    state: str
    reason: str
    comment: str
    dependency: str = ""

    @property
    def live(self) -> bool:
        return self.state not in ENDED

    @property
    def needs(self) -> frozenset[str]:
        """The ids of the jobs that it waits for."""
        return frozenset(re.findall(r":(\d+)", self.dependency))

    def is_of(self, stage: str) -> bool:
        """Whether it can be a stage's job: another cluster's job may have the same number."""
        return self.name.endswith(f".{stage}")


@dataclass(frozen=True)
class JobRecord:
    """The latest attempt of a job, as the controller or accounting has it.

    Attributes:
        exit_code: the batch script's exit code and the signal that ended it, such as 1:0.
        nodes: a host list, such as node[1-2].
        failed_node: the node that Slurm gave up on; empty if it reports none.
        requeueable: the controller still has the job and would requeue it.
        dependency_failed: cancelled by Slurm because a job that it waited for failed (kill_invalid_depend).
        restarts: how often it was requeued; None if Slurm does not report it.
    """

    job_id: str
    state: str
    exit_code: str
    nodes: str = ""
    failed_node: str = ""
    requeueable: bool = False
    dependency_failed: bool = False
    restarts: int | None = None


def parse_queue(text: str) -> Iterator[QueuedJob]:
    """The jobs in squeue's output of QUEUE_FORMAT."""
    for line in text.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6:  # another job's name or comment may have broken its line
            job_id, state, reason, dependency, name, comment = ("" if field in _NOTHING else field for field in fields)
            yield QueuedJob(job_id, name, state, reason, comment, dependency)


def parse_accounting(text: str) -> Iterator[JobRecord]:
    """The jobs in sacct's output of ACCOUNTING_FORMAT."""
    for line in text.splitlines():
        job_id, state, exit_code, nodes = line.split("|")
        nodes = "" if nodes.startswith("None") else nodes
        # The state is "CANCELLED by 1000" if a user cancelled the job.
        yield JobRecord(job_id, state.split()[0], exit_code, nodes, dependency_failed=state == "CANCELLED")


def parse_fields(text: str) -> dict[str, str]:
    """The fields in the output of ``scontrol --oneliner show job``."""
    fields: dict[str, str] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        fields.setdefault(name, value)  # a comment, which comes later, may contain anything
    return fields


def record_of(job_id: str, fields: Mapping[str, str]) -> JobRecord:
    """The record of a job from its fields."""
    facts = {name: "" if value in _NOTHING else value for name, value in fields.items()}
    state, restarts = facts["JobState"], facts.get("Restarts", "")
    return JobRecord(
        job_id,
        state,
        facts.get("ExitCode", ""),
        facts.get("NodeList", ""),
        facts.get("FailedNode", ""),
        requeueable=facts.get("Requeue") == "1",
        dependency_failed=state == "CANCELLED" and facts.get("Reason") == "DependencyNeverSatisfied",
        restarts=int(restarts) if restarts.isdigit() else None,
    )


def is_preempted(fields: Mapping[str, str]) -> bool:
    """Whether a job was preempted since its last start: PreemptTime may be that of an earlier attempt."""
    time = fields.get("PreemptTime", "None")
    return time[:1].isdigit() and time >= fields.get("StartTime", "")


StopCause = Literal["cancelled", "requeued", "time limit", ""]


def stop_cause(fields: Mapping[str, str], restarts: int) -> StopCause:
    """What ended a job whose ranks were signalled; empty while nothing has.

    Args:
        restarts: how often it had been requeued when it started.
    """
    if int(fields.get("Restarts", 0)) > restarts:
        return "requeued"
    if fields.get("JobState") in ("RUNNING", "PENDING") or is_preempted(fields):
        return ""  # in the grace time before a preemption, or before the time limit
    at_limit = seconds(fields["RunTime"]) >= seconds(fields["TimeLimit"])
    return "time limit" if fields.get("Reason") == "TimeLimit" or at_limit else "cancelled"
