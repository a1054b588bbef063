"""How an attempt ended, judged from the ledger, from Slurm's record of the job and from the logs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from hpc_rlhf.errors import INPUT_WRONG, STOPPED_EARLY
from hpc_rlhf.run import reasons
from hpc_rlhf.run.attempt_logs import AttemptLogs
from hpc_rlhf.run.events import AttemptEvent, Cancelled, Ended, Failed, Hang, Requeued, Retried, Started
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.slurm.jobs import UNKNOWN_END, JobRecord

_BY_STATE = {
    "PREEMPTED": reasons.PREEMPTED,
    "TIMEOUT": reasons.TIME_LIMIT,
    "NODE_FAIL": reasons.NODE_FAILURE,
    "BOOT_FAIL": reasons.NODE_FAILURE,
    "OUT_OF_MEMORY": reasons.KILLED_FOR_MEMORY,
    "DEADLINE": reasons.PAST_DEADLINE,
    "CANCELLED": reasons.CANCELLED_BY_HAND,
}
# As slurmstepd writes it into the batch log.
_DUE_TO = {
    "PREEMPTION": reasons.PREEMPTED,
    "TIME LIMIT": reasons.TIME_LIMIT,
    "NODE FAILURE": reasons.NODE_FAILURE,
    "JOB REQUEUE": reasons.REQUEUED_BY_HAND,
}
# Written by the batch script when it requeues a job that was preempted before its ranks were up.
_PREEMPTED_EARLY = "hpc-rlhf: preempted"
# The last line of a batch script that came to its end, and so was not stopped by Slurm.
_EXIT_CODE = re.compile(r"hpc-rlhf: ended with exit code (\d+)")
_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.+)")
# torchrun and DeepSpeed's launcher, whose end srun sees instead of the rank's.
_UNDER_LAUNCHER = re.compile(r"failed \(exitcode: (?P<torch>-?\d+)\)|exits with return code = (?P<ds>-?\d+)")
_LONGEST = 300  # characters of a message, so that it fits into a table


class _Cause(NamedTuple):
    """Why an attempt ended, the message that shows it, and the node where it began; empty where unknown."""

    reason: str
    message: str = ""
    node: str = ""


def judge(history: StageHistory, job: JobRecord | None, logs: AttemptLogs, step: int) -> Ended:
    """How the latest attempt at a stage without a complete artifact ended.

    Args:
        history: the stage's.
        job: Slurm's record of the ended job; None if there is none.
        logs: of the same attempt.
        step: the last step in the stage's metrics.
    """
    attempt = history.attempt
    if (
        job is not None
        and job.restarts is None
        and job.state == "PREEMPTED"
        and _was_preempted_before(history, job.job_id)
    ):
        job = replace(job, state=UNKNOWN_END, exit_code="")  # accounting does not show when it was preempted
    cause = _by_ledger(attempt, job) or _by_slurm(job, logs, attempt) or _by_logs(attempt, job, logs)
    node = cause.node
    if not node and job is not None:
        node = job.failed_node or ("" if re.search(r"[\[,]", job.nodes) else job.nodes)
    return _ended(history, cause._replace(node=node), step)


def judge_requeued(history: StageHistory, job_id: str, logs: AttemptLogs, step: int) -> Ended:
    """How an attempt ended whose job Slurm requeued by itself.

    It does so for no fault of the job; or, from 24.05 on, although the job failed, if that was preempted before.

    Args:
        history: the stage's before the attempt that came after.
        logs: of the attempt that ended.
        step: the last step in the stage's metrics.
    """
    attempt = history.attempt
    cause = _by_ledger(attempt, None) or _by_slurm(None, logs, attempt)
    ended_itself = _EXIT_CODE.search(logs.batch) is not None
    if cause is None and (own_failure(attempt) or (ended_itself and _was_preempted_before(history, job_id))):
        cause = _by_logs(attempt, None, logs)
    elif cause is None and ended_itself:
        cause = _Cause(reasons.PREEMPTED)
    elif cause is None:
        # srun runs on rank 0's node and reports any other node that is lost.
        start = next(iter(attempt.all(Started)), None)
        cause = _Cause(reasons.NODE_FAILURE, node=start.host if start else "")
    return _ended(history, cause, step)


def _was_preempted_before(history: StageHistory, job_id: str) -> bool:
    """Whether a job has ended an earlier attempt because it was preempted, and may still be marked for that."""
    requeued = [event.attempt.partition("-")[0] for event in history.all(Requeued) if event.reason == reasons.PREEMPTED]
    ended = [event.job_id for event in history.all(Ended) if event.reason == reasons.PREEMPTED]
    return job_id in (*requeued, *ended)


def _ended(history: StageHistory, cause: _Cause, step: int) -> Ended:
    message = " ".join(cause.message.split())
    if len(message) > _LONGEST:
        message = message[: _LONGEST - 1] + "…"
    return Ended(reason=cause.reason, message=message, node=cause.node, step=step, progress=history.has_progress)


def own_failure(attempt: StageHistory) -> Failed | None:
    """The failure of a rank that was not caused by another rank's; None if there is none."""
    failed = attempt.first_cause
    return None if failed is None or reasons.is_consequence(failed.message) else failed


def _by_ledger(attempt: StageHistory, job: JobRecord | None) -> _Cause | None:
    """What nothing outweighs: a cancellation, a user error, a hang, a stop after which Slurm refused the requeue."""
    cancellations = attempt.all(Cancelled)
    if cancellations:
        # A rank that finds its job cancelled names its attempt; `hpc-rlhf cancel` does not.
        by_tool = any(not event.attempt for event in cancellations)
        return _Cause(reasons.CANCELLED_BY_TOOL if by_tool else reasons.CANCELLED_BY_HAND)
    cause = attempt.first_cause
    if cause is not None and cause.exit_code == INPUT_WRONG:
        return _Cause(reasons.USER_ERROR, cause.message)
    if cause is not None and cause.exit_code == STOPPED_EARLY:
        return _Cause(reasons.STOPPED_EARLY, cause.message)
    hang = next(iter(attempt.all(Hang)), None)
    if hang is not None:
        return _Cause(reasons.HANG, hang.message, hang.host)
    requeued = _refused_requeue(attempt, job)
    return None if requeued is None else _Cause(requeued.reason)


def _refused_requeue(attempt: StageHistory, job: JobRecord | None) -> Requeued | None:
    """The requeue that an attempt requested once all was saved, if no other attempt came of it: Slurm refuses where
    JobRequeue=0 or a submit plugin forbids it. None if there is none."""
    requeued = attempt.last(Requeued)
    if requeued is None or not requeued.reason:
        return None
    names = {event.attempt for event in attempt.events if isinstance(event, AttemptEvent)}
    restarts = job.restarts if job is not None else None
    restarted = restarts is not None and requeued.attempt.rpartition("-")[2] != str(restarts)
    return None if restarted or names != {requeued.attempt} else requeued


def _by_slurm(job: JobRecord | None, logs: AttemptLogs, attempt: StageHistory) -> _Cause | None:
    """Slurm's reason, where it gives one.

    A rank's own failure outweighs a preemption: from 26.05 on, srun sends the other ranks the signal of a
    preemption when one has failed.
    """
    if job is not None and job.reason == "BadConstraints":
        retried = attempt.last(Retried)
        excluded = retried is not None and retried.without
        message = f"no node{' but those excluded' if excluded else ''} has what the job requests ({job.reason})"
        cause: _Cause | None = _Cause(reasons.NO_NODES_LEFT if excluded else reasons.FAILED, message)
    elif job is not None and job.state in _BY_STATE:
        cause = _Cause(_BY_STATE[job.state], node=job.failed_node)
    else:
        cause = _by_batch_log(logs)
    preempted = cause is not None and cause.reason == reasons.PREEMPTED
    return None if preempted and own_failure(attempt) else cause


def _by_batch_log(logs: AttemptLogs) -> _Cause | None:
    """What slurmstepd, srun and the batch script wrote as the job ended."""
    line = _line_with(_PREEMPTED_EARLY, logs.batch)
    if line:
        return _Cause(reasons.PREEMPTED, line)
    for words, reason in _DUE_TO.items():
        line = _line_with(f"DUE TO {words}", logs.batch)
        if line:
            return _Cause(reason, line)
    line = _line_with("Node failure on ", logs.batch)
    return _Cause(reasons.NODE_FAILURE, line, line.split("Node failure on ")[1].split()[0]) if line else None


def _by_logs(attempt: StageHistory, job: JobRecord | None, logs: AttemptLogs) -> _Cause:
    """A failure: what the rank that caused it reported, else how srun saw the first rank end."""
    failed = own_failure(attempt)
    if failed is not None:
        return _Cause(_kind(failed), failed.message, failed.host)
    memory = _line_with("oom_kill", logs.batch) or _line_with("oom-kill", logs.batch)
    if memory:
        return _Cause(reasons.KILLED_FOR_MEMORY, memory)
    consequence = attempt.first_cause
    peer_gone = consequence is not None and reasons.is_peer_gone(consequence.message)
    task = _TASK.search(logs.batch)
    if task is not None and task["how"].startswith("Killed"):
        return _Cause(reasons.KILLED, task[0], task["node"])
    killed = [task for task in _TASK.finditer(logs.batch) if task["how"].startswith("Killed")]
    if killed and peer_gone:
        # srun first noticed a rank that had lost a killed one, and then killed the others itself.
        nodes = {task["node"] for task in killed}
        return _Cause(reasons.KILLED, killed[0][0], nodes.pop() if len(nodes) == 1 else "")
    codes = [match["torch"] or match["ds"] for match in _UNDER_LAUNCHER.finditer(logs.batch)]
    if "-9" in codes and (consequence is None or peer_gone):
        return _Cause(reasons.KILLED, "a rank was ended by SIGKILL")
    if consequence is not None:
        return _Cause(reasons.NETWORK, consequence.message, consequence.host)
    if codes:  # srun's tasks are nodes then
        return _Cause(reasons.FAILED, f"a rank ended with exit code {codes[0]}", task["node"] if task else "")
    if task is not None:
        line = logs.last_line(int(task["rank"]))
        reason = reasons.OUT_OF_MEMORY if reasons.is_out_of_memory(line) else reasons.FAILED
        return _Cause(reason, line if line and "exit code" in task["how"] else task[0], task["node"])
    if job is not None and (job.exit_code.endswith(":9") or job.exit_code.startswith("137:")):
        return _Cause(reasons.KILLED, f"exit code {job.exit_code}")  # of the script, or of srun
    ending = _EXIT_CODE.search(logs.batch)
    if ending is not None and ending[1] == "137":
        return _Cause(reasons.KILLED, ending[0])
    ours = ("hpc-rlhf: attempt ", "hpc-rlhf: ended with ")
    lines = [line for line in logs.batch.splitlines() if line.strip() and not line.startswith(ours)]
    if lines:
        return _Cause(reasons.FAILED, lines[-1])
    if ending is not None:
        return _Cause(reasons.FAILED, ending[0])
    return _Cause(reasons.FAILED, f"Slurm reports {job.state}" if job else "it left no message")


def _kind(failed: Failed) -> str:
    if failed.killed:
        return reasons.KILLED
    if reasons.is_of_engine(failed.message):
        return reasons.INFERENCE_ENGINE
    return reasons.OUT_OF_MEMORY if reasons.is_out_of_memory(failed.message) else reasons.FAILED


def _line_with(words: str, text: str) -> str:
    return next((line for line in text.splitlines() if words in line), "")
