"""Jobs and their times as Slurm reports them, parsed from the output of squeue, sacct and scontrol."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# squeue shows a finished job for a few minutes (MinJobAge); in these states it has ended for good.
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
})  # fmt: skip
# Our word for the end of a job that Slurm calls PREEMPTED only because it requeued itself in an earlier attempt, while
# that was preempted (from 24.05 on). Slurm then keeps no exit code either.
UNKNOWN_END = "an end unknown to Slurm"
_NOTHING = ("None", "(null)")
QUEUE_FORMAT = "%i|%T|%r|%E|%o|%j|%k"
ACCOUNTING_FORMAT = "JobID,State,ExitCode,NodeList"


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it.

    Attributes:
        state: Slurm's state, such as PENDING.
        reason: why it is pending or ended; empty otherwise.
        dependency: what it waits for, as squeue writes it; empty if it waits for no other job.
        script: the path of its script, and the script's arguments.
    """

    job_id: str
    name: str
    state: str
    reason: str
    comment: str
    dependency: str = ""
    script: str = ""

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

    def is_from(self, folder: Path) -> bool:
        """Whether its script is in a folder."""
        return self.script.startswith(f"{folder}/")


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
        reason: why it is pending or ended, such as BadConstraints; empty if Slurm gives none.
    """

    job_id: str
    state: str
    exit_code: str
    nodes: str = ""
    failed_node: str = ""
    requeueable: bool = False
    dependency_failed: bool = False
    restarts: int | None = None
    reason: str = ""


def parse_queue(text: str) -> Iterator[QueuedJob]:
    """The jobs in squeue's output of QUEUE_FORMAT."""
    for line in text.splitlines():
        fields = ["" if field in _NOTHING else field for field in line.split("|", 6)]
        if len(fields) == 7:  # another job's name or comment may have broken its line
            job_id, state, reason, dependency, script, name, comment = fields
            yield QueuedJob(job_id, name, state, reason, comment, dependency, script)


def parse_accounting(text: str) -> Iterator[JobRecord]:
    """The jobs in sacct's output of ACCOUNTING_FORMAT."""
    for line in text.splitlines():
        job_id, state, exit_code, nodes = line.split("|")
        nodes = "" if nodes.startswith("None") else nodes
        # The state is "CANCELLED by 1000" if a user cancelled the job.
        yield JobRecord(job_id, state.split()[0], exit_code, nodes, dependency_failed=state == "CANCELLED")


def record_of(job_id: str, fields: Mapping[str, str]) -> JobRecord:
    """The record of a job from the fields that scontrol shows."""
    facts = {name: "" if value in _NOTHING else value for name, value in fields.items()}
    state, exit_code, restarts = facts["JobState"], facts.get("ExitCode", ""), facts.get("Restarts", "")
    if state == "PREEMPTED" and "PreemptTime" in fields and not is_preempted(fields):
        state, exit_code = UNKNOWN_END, ""
    return JobRecord(
        job_id,
        state,
        exit_code,
        facts.get("NodeList", ""),
        facts.get("FailedNode", ""),
        requeueable=facts.get("Requeue") == "1",
        dependency_failed=state == "CANCELLED" and facts.get("Reason") == "DependencyNeverSatisfied",
        restarts=int(restarts) if restarts.isdigit() else None,
        reason=facts.get("Reason", ""),
    )


def is_full(message: str) -> bool:
    """Whether sbatch refused a job because the user, the account or the QOS has as many as a limit allows."""
    return re.search(r"SubmitJobs?(Per\w+)?Limit", message) is not None


def is_preempted(fields: Mapping[str, str]) -> bool:
    """Whether a job was preempted since its last start: PreemptTime may be that of an earlier attempt."""
    time = fields.get("PreemptTime", "None")
    return time[:1].isdigit() and time >= fields.get("StartTime", "")


def seconds(text: str) -> float:
    """Seconds in MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; infinite for a word such as UNLIMITED."""
    if not text[:1].isdigit():
        return math.inf
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:  # MM, MM:SS
        parts.insert(0, 0)
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def time_limit(text: str) -> int | None:
    """A job's time limit in seconds; None for no limit."""
    return int(seconds(text)) or None
