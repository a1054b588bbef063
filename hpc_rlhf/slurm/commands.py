"""Calls Slurm's commands. Both halves use it, and it imports little, because every rank loads it."""

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
from pathlib import Path
from typing import Literal

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.slurm import jobs
from hpc_rlhf.slurm.jobs import JobRecord, QueuedJob

_TIMEOUT = 60
# What selects the cluster and authenticates the user. Every other variable of these names describes another
# job, or is a default that would silently override the spec.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"})
_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")


def available() -> bool:
    """Whether Slurm's commands are installed here."""
    return all(shutil.which(program) for program in ("sbatch", "squeue", "scontrol", "scancel"))


def foreign_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables that describe another job, or are a default for one of Slurm's commands."""
    return sorted(name for name in environ if name.startswith(_PREFIXES) and name not in _KEPT)


# Jobs


def queue(user: str | None = None) -> dict[str, QueuedJob]:
    """This or another user's jobs that the controller knows, including just finished ones, by job id."""
    whose = "--me" if user is None else f"--user={user}"
    text = run(["squeue", whose, "--noheader", "--states=all", f"--format={jobs.QUEUE_FORMAT}"])
    return {job.job_id: job for job in jobs.parse_queue(text)}


def accounting(job_ids: Sequence[str]) -> dict[str, JobRecord]:
    """What accounting has about jobs. Empty if a cluster keeps no accounts; a new job may be missing."""
    if not job_ids or shutil.which("sacct") is None:
        return {}
    options = ["--allocations", "--noheader", "--parsable2", f"--format={jobs.ACCOUNTING_FORMAT}"]
    try:
        text = run(["sacct", *options, f"--jobs={','.join(job_ids)}"])
    except HpcRlhfError:
        return {}
    return {record.job_id: record for record in jobs.parse_accounting(text)}


def find_record(job_id: str) -> JobRecord | None:
    """The controller's record of a job, else that of accounting; None if neither knows the job.

    Raises:
        HpcRlhfError: the controller does not answer.
    """
    try:
        return jobs.record_of(job_id, _job_fields(job_id))
    except HpcRlhfError as error:
        if "Invalid job id" not in error.message:
            raise
        return accounting([job_id]).get(job_id)


def why_ended(job_id: str, restarts: int) -> Literal["cancelled", "requeued", "time limit", ""]:
    """What ended a job whose ranks were signalled; empty while nothing has.

    The ranks get the same signal when a job is preempted or out of time, and then it should be requeued. A
    job that the user cancelled must not be: Slurm would run it again.

    Args:
        restarts: how often it had been requeued when it started.
    """
    fields = _job_fields(job_id)
    if int(fields.get("Restarts", 0)) > restarts:
        return "requeued"
    if fields.get("JobState") in ("RUNNING", "PENDING") or jobs.is_preempted(fields):
        return ""  # in the grace time before a preemption, or before the time limit
    at_limit = jobs.seconds(fields["RunTime"]) >= jobs.seconds(fields["TimeLimit"])
    return "time limit" if fields.get("Reason") == "TimeLimit" or at_limit else "cancelled"


def was_preempted(job_id: str) -> bool:
    """Whether a job has been preempted since it last started. False if Slurm does not answer."""
    try:
        return jobs.is_preempted(_job_fields(job_id))
    except HpcRlhfError:
        return False


def start_and_end(job_id: str) -> tuple[float, float]:
    """When a running job started and when its time is up, in Unix seconds by the controller's clock.

    The end is infinite if Slurm does not report it.
    """
    times = [os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END")]  # newer than 22.05
    if all(text.isdigit() for text in times):
        return float(times[0]), float(times[1])
    with suppress(HpcRlhfError, ValueError):
        fields = _job_fields(job_id)
        start, end = (
            time.mktime(time.strptime(fields.get(name, ""), "%Y-%m-%dT%H:%M:%S")) for name in ("StartTime", "EndTime")
        )
        return start, end
    return 0.0, math.inf


def _job_fields(job_id: str) -> dict[str, str]:
    with _signals_blocked():
        text = run(["scontrol", "--oneliner", "show", "job", job_id])
    fields: dict[str, str] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        fields.setdefault(name, value)  # a comment, which comes later, may contain anything
    return fields


def partition_limit(names: str) -> float:
    """The longest time limit, in seconds, that one of some partitions allows; infinite for none."""
    limits = []
    for name in names.split(","):
        text = run(["scontrol", "--oneliner", "show", "partition", name])
        limits += [jobs.seconds(limit) for limit in re.findall(r" MaxTime=(\S+)", text)]
    return max(limits, default=math.inf)


def hostnames(nodes: str) -> list[str]:
    """The nodes of a host list, such as node[1-2]."""
    return run(["scontrol", "show", "hostnames", nodes]).split()


# Changes


def submit(script: Path, options: Sequence[str]) -> str:
    """Submit a script, and return its job id."""
    return submitted_id(run(["sbatch", "--parsable", *options, str(script)]))


def submitted_id(output: str) -> str:
    """The job id in the output of ``sbatch --parsable``, which a site's banner may precede.

    Raises:
        HpcRlhfError: there is none.
    """
    ids = re.findall(r"^\s*(\d+)(?:;\S*)?\s*$", output, re.MULTILINE)
    if not ids:
        raise HpcRlhfError(f"sbatch printed no job id: {output.strip() or 'nothing'}", exit_code=RUN_FAILED)
    return str(ids[-1])


def try_out(script: Path, options: Sequence[str] = (), timeout: int = _TIMEOUT) -> str:
    """Let Slurm check a script without submitting it, and return when and where it would start, in Slurm's words.

    Raises:
        HpcRlhfError: it would be rejected, for instance because no node has what it requests.
    """
    return execute(["sbatch", "--test-only", *options, str(script)], timeout).stderr


def requeue(job_id: str) -> None:
    """Put a running or finished job back into the queue under its own id, unless it is there already."""
    try:
        with _signals_blocked():
            run(["scontrol", "requeue", job_id])
    except HpcRlhfError as error:
        if "Job is pending execution" not in error.message:
            raise


def delay_start(job_id: str, seconds: int, excluded: str | None) -> None:
    """Let a pending job start only after a while, and not on some nodes.

    Args:
        excluded: a host list that replaces the job's own; None keeps that.
    """
    changes = [f"StartTime=now+{seconds}"] * (seconds > 0)
    changes += [] if excluded is None else [f"ExcNodeList={excluded}"]
    if changes:
        run(["scontrol", "update", f"JobId={job_id}", *changes])


def release(job_id: str) -> None:
    """Release a held job."""
    run(["scontrol", "release", job_id])


def dependency(needs: Sequence[str], behind: Sequence[str] = ()) -> str:
    """A dependency for sbatch and scontrol: some jobs must succeed, others must end; empty for none."""
    waits = (("afterok", needs), ("afterany", behind))
    return ",".join(f"{kind}:{':'.join(job_ids)}" for kind, job_ids in waits if job_ids)


def set_dependency(job_id: str, needs: Sequence[str], behind: Sequence[str] = ()) -> None:
    """Let a pending job wait until some jobs have succeeded and others have ended; for none, release it."""
    run(["scontrol", "update", f"JobId={job_id}", f"Dependency={dependency(needs, behind)}"])


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs for good. A stage that Slurm signals requeues itself, so forbid that first."""
    for job_id in job_ids:
        try:
            run(["scontrol", "update", f"JobId={job_id}", "Requeue=0"])
        except HpcRlhfError:
            continue  # it has just ended; scancel ignores those
    if job_ids:
        run(["scancel", *job_ids])


# Processes


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Protect a command from the signals that stop a job's step.

    They go to every process of the step. The command that requests a requeue may still be running when Slurm,
    having agreed, ends the step; killed by that, it would look refused.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(command: list[str]) -> str:
    """The output of a Slurm command, which must succeed within a minute; see ``execute``."""
    return execute(command, _TIMEOUT).stdout


def execute(command: list[str], timeout: int) -> subprocess.CompletedProcess[str]:
    """A Slurm command that has succeeded within ``timeout`` seconds.

    Raises:
        HpcRlhfError: it is missing, fails or does not answer; the message is its own.
    """
    foreign = set(foreign_variables(os.environ))
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    try:
        process = subprocess.run(
            command, env=environ, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except FileNotFoundError:
        raise HpcRlhfError(
            f"{command[0]} is not on PATH", hint="run this on a machine with Slurm's commands", exit_code=RUN_FAILED
        ) from None
    except subprocess.TimeoutExpired:
        raise HpcRlhfError(
            f"{command[0]} did not answer within {timeout} s",
            hint="the cluster's controller may be busy; try again",
            exit_code=RUN_FAILED,
        ) from None
    if process.returncode:
        message = process.stderr.strip() or process.stdout.strip() or f"exit code {process.returncode}"
        raise HpcRlhfError(f"{' '.join(command[:2])}: {message}", exit_code=RUN_FAILED)
    return process
