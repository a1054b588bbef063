"""The Slurm commands that both wings use, and their answers parsed. Light: the ranks import it too."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

# squeue shows a finished job for a few minutes (MinJobAge); in these states it has ended for good.
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
_NOTHING = ("None", "(null)")
_TIMEOUT = 60
# What selects the cluster and proves who we are; everything else of these names is about some other job, or a
# default that would quietly outweigh the spec.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"})
_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it.

    Attributes:
        job_id: its number.
        name: its name.
        state: Slurm's word, such as PENDING.
        reason: why it is pending or ended; empty otherwise.
        comment: its comment.
        dependency: what it waits for, as squeue writes it; empty when for no other job.
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
class PastJob:
    """The latest attempt of a job as Slurm remembers it.

    Attributes:
        exit_code: the batch script's exit code and the signal that ended it, such as 1:0.
        nodes: a host list, such as node[1-2].
        failed_node: the node that Slurm gave up on; empty where it does not say.
        requeueable: the controller still has it, and would requeue it.
        bereft: cancelled by Slurm, because a job that it waited for ended badly (``kill_invalid_depend``).
        restarts: how often it was requeued; None where Slurm does not say.
    """

    job_id: str
    state: str
    exit_code: str
    nodes: str = ""
    failed_node: str = ""
    requeueable: bool = False
    bereft: bool = False
    restarts: int | None = None


def available() -> bool:
    """Whether Slurm's commands are here."""
    return all(shutil.which(program) for program in ("sbatch", "squeue", "scontrol", "scancel"))


def foreign_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables that say something about another job, or are a default for one of Slurm's commands."""
    return sorted(name for name in environ if name.startswith(_PREFIXES) and name not in _KEPT)


def queue() -> dict[str, QueuedJob]:
    """This user's jobs that Slurm's controller knows, just finished ones too, by job id."""
    text = run(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%E|%j|%k"])
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6:  # another job's name or comment may have broken its line
            job_id, state, reason, dependency, name, comment = (
                "" if field in _NOTHING else field for field in fields
            )
            jobs[job_id] = QueuedJob(job_id, name, state, reason, comment, dependency)
    return jobs


def history(job_ids: Sequence[str]) -> dict[str, PastJob]:
    """What accounting remembers of jobs. Empty where a cluster keeps no accounts; a new job may be missing."""
    if not job_ids or shutil.which("sacct") is None:
        return {}
    command = [
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        "--format=JobID,State,ExitCode,NodeList",
    ]
    try:
        text = run([*command, f"--jobs={','.join(job_ids)}"])
    except HpcRlhfError:
        return {}
    jobs = {}
    for line in text.splitlines():
        job_id, state, exit_code, nodes = line.split("|")
        # "CANCELLED by 1000" where somebody did it
        nodes = "" if nodes.startswith("None") else nodes
        jobs[job_id] = PastJob(job_id, state.split()[0], exit_code, nodes, bereft=state == "CANCELLED")
    return jobs


def remembered(job_id: str) -> PastJob | None:
    """All that the controller knows of a job, or else what accounting does; None where neither knows it.

    Raises:
        HpcRlhfError: the controller gives no answer.
    """
    try:
        fields = _job_fields(job_id)
    except HpcRlhfError as error:
        if "Invalid job id" not in error.message:
            raise
        return history([job_id]).get(job_id)
    told = {name: "" if value in _NOTHING else value for name, value in fields.items()}
    return PastJob(
        job_id,
        told["JobState"],
        told.get("ExitCode", ""),
        told.get("NodeList", ""),
        told.get("FailedNode", ""),
        told.get("Requeue") == "1",
        told["JobState"] == "CANCELLED" and told.get("Reason") == "DependencyNeverSatisfied",
        int(told["Restarts"]) if told.get("Restarts", "").isdigit() else None,
    )


def requeue(job_id: str) -> None:
    """Put a running or finished job back in the queue under its own id, if nobody else has."""
    try:
        with _unheard():
            run(["scontrol", "requeue", job_id])
    except HpcRlhfError as error:
        if "Job is pending execution" not in error.message:
            raise


def why_ended(job_id: str, restarts: int) -> Literal["cancelled", "requeued", "time limit", ""]:
    """What ended a job whose ranks have been told to stop: a person, somebody who requeued it, its time limit, or nothing yet.

    The ranks hear the same signal when a job is preempted or out of time, and then it should be requeued. A job
    that somebody cancelled must not be: Slurm would run it again.

    Args:
        restarts: how often it had been requeued when it started.
    """
    fields = _job_fields(job_id)
    if int(fields.get("Restarts", 0)) > restarts:
        return "requeued"
    if fields.get("JobState") in ("RUNNING", "PENDING") or _preempted(fields):
        return ""  # in the grace before a preemption, or before the time limit
    out_of_time = fields.get("Reason") == "TimeLimit" or seconds(fields["RunTime"]) >= seconds(fields["TimeLimit"])  # fmt: skip
    return "time limit" if out_of_time else "cancelled"


def was_preempted(job_id: str) -> bool:
    """Whether a job has been preempted since it last started. False where Slurm gives no answer."""
    try:
        return _preempted(_job_fields(job_id))
    except HpcRlhfError:
        return False


def start_and_end(job_id: str) -> tuple[float, float]:
    """When a running job started, and when its time is up, in seconds since the epoch by the controller's clock.

    Without end where Slurm does not say.
    """
    said = [os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END")]  # newer than 22.05
    if all(text.isdigit() for text in said):
        return float(said[0]), float(said[1])
    with suppress(HpcRlhfError, ValueError):
        fields = _job_fields(job_id)
        start, end = (
            time.mktime(time.strptime(fields.get(name, ""), "%Y-%m-%dT%H:%M:%S"))
            for name in ("StartTime", "EndTime")
        )
        return start, end
    return 0.0, math.inf


@contextmanager
def _unheard() -> Iterator[None]:
    """Within it, a command of ours does not hear the signals that stop a job's step.

    They go to every process of the step. The one that asks for a requeue may still be there when Slurm, having
    agreed, ends the step; ended by that, it would look refused.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _job_fields(job_id: str) -> dict[str, str]:
    """What Slurm's controller knows of a job."""
    with _unheard():
        said = run(["scontrol", "--oneliner", "show", "job", job_id])
    fields: dict[str, str] = {}
    for word in said.split():
        name, _, value = word.partition("=")
        fields.setdefault(name, value)  # a comment, which is further on, may hold anything
    return fields


def _preempted(fields: Mapping[str, str]) -> bool:
    """A requeued job may still carry the time at which its attempt before was preempted."""
    time = fields.get("PreemptTime", "None")
    return time[:1].isdigit() and time >= fields.get("StartTime", "")


def hostnames(nodes: str) -> list[str]:
    """The nodes of a host list, such as node[1-2].

    Raises:
        HpcRlhfError: scontrol gives no answer.
    """
    return run(["scontrol", "show", "hostnames", nodes]).split()


def submit(script: Path, options: Sequence[str]) -> str:
    """Submit a script, and return its job id."""
    return run(["sbatch", "--parsable", *options, str(script)]).split(";")[0].strip()


def put_off(job_id: str, seconds: int, excluded: str | None) -> None:
    """Let a pending job start only after a while, and not on some nodes.

    Args:
        excluded: a host list in place of the one that the job has; None leaves that.
    """
    changes = [f"StartTime=now+{seconds}"] * (seconds > 0)
    changes += [] if excluded is None else [f"ExcNodeList={excluded}"]
    if changes:
        run(["scontrol", "update", f"JobId={job_id}", *changes])


def release(job_id: str) -> None:
    """Let a held job go."""
    run(["scontrol", "release", job_id])


def dependency(needs: Sequence[str], behind: Sequence[str] = ()) -> str:
    """For sbatch and scontrol: to wait for some jobs to end well, and for others to end; empty for none."""
    waits = (("afterok", needs), ("afterany", behind))
    return ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in waits if jobs)


def set_dependency(job_id: str, needs: Sequence[str], behind: Sequence[str] = ()) -> None:
    """Let a pending job wait for some to end well, and for others to end; for none, let it go."""
    run(["scontrol", "update", f"JobId={job_id}", f"Dependency={dependency(needs, behind)}"])


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs for good. A stage that is told to stop requeues itself, so that is forbidden first."""
    for job_id in job_ids:
        try:
            run(["scontrol", "update", f"JobId={job_id}", "Requeue=0"])
        except HpcRlhfError:
            continue  # it has just ended; scancel passes over those
    if job_ids:
        run(["scancel", *job_ids])


def run(command: list[str]) -> str:
    """What a Slurm command prints.

    Raises:
        HpcRlhfError: see ``done``.
    """
    return done(command, _TIMEOUT).stdout


def done(command: list[str], timeout: int) -> subprocess.CompletedProcess[str]:
    """A Slurm command that has ended well in ``timeout`` seconds.

    Raises:
        HpcRlhfError: it is not here, fails or does not answer; the message is its own.
    """
    foreign = set(foreign_variables(os.environ))
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    try:
        ended = subprocess.run(
            command, env=environ, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except FileNotFoundError:
        raise HpcRlhfError(
            f"{command[0]} is not on PATH", hint="run this where Slurm's commands are", exit_code=RUN_FAILED
        ) from None
    except subprocess.TimeoutExpired:
        raise HpcRlhfError(
            f"{command[0]} gave no answer in {timeout} s",
            hint="the cluster's controller may be busy; try again",
            exit_code=RUN_FAILED,
        ) from None
    if ended.returncode:
        said = ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}"
        raise HpcRlhfError(f"{' '.join(command[:2])}: {said}", exit_code=RUN_FAILED)
    return ended


def seconds(time: str) -> float:
    """A span as scontrol writes it, D-HH:MM:SS or HH:MM:SS; without end where it is a word."""
    if not time[:1].isdigit():
        return math.inf
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
