"""Judge the state of a stage from what is known about it. Pure functions.

A complete artifact outranks Slurm, and Slurm outranks what the ledger says last.
"""

from __future__ import annotations

from hpc_rlhf.observe.gather import Evidence
from hpc_rlhf.run import events
from hpc_rlhf.slurm.jobs import ENDED, JobRecord, QueuedJob

# What Slurm's pending reasons mean.
_REASONS = {
    "Priority": "other jobs have a higher priority",
    "Resources": "waiting for free nodes",
    "BeginTime": "Slurm delays a requeued job",
    "JobHeldUser": "held by its owner; to release it: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "launch_failed_requeued_held": "a node failed to launch it; to release it: scontrol release",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "its time limit exceeds the partition's",
    "PartitionNodeLimit": "it needs more nodes than the partition has",
    "ReqNodeNotAvail": "a required node is unavailable",
    "Reservation": "waiting for its reservation",
}


def judge(evidence: Evidence) -> tuple[str, str]:
    """The state of a stage, and why; the reason may be empty."""
    state, why = _judge(evidence)
    unknown = evidence.slurm_error and evidence.job_id is not None and not evidence.done
    return state, evidence.slurm_error if unknown else why


def _judge(evidence: Evidence) -> tuple[str, str]:
    if evidence.done:
        return "done", ""
    if evidence.queued is not None and evidence.queued.live:
        return _judge_live(evidence.queued, evidence)
    state = evidence.history.state
    if isinstance(state, (events.Failed, events.Refused)):
        return state.name, state.message
    if isinstance(state, events.Cancelled):
        return state.name, ""
    if isinstance(state, events.Stopped):
        return state.name, f"{state.message}; fix the cause, then run hpc-rlhf heal"
    if isinstance(state, events.Ended):
        return "failed", _ending(evidence)
    if isinstance(state, events.Interrupted):
        return "interrupted", "run it again to resume"
    job = evidence.queued or evidence.past
    if job is not None and not (isinstance(job, JobRecord) and job.state not in ENDED):
        name = "cancelled" if job.state == "CANCELLED" else "failed"
        return name, f"Slurm reports {job.state}; to resume, run hpc-rlhf heal"
    if evidence.job_id is not None:
        return "unknown", f"Slurm has no job {evidence.job_id}; to resume, run hpc-rlhf heal"
    if isinstance(state, events.Submitting):
        return "unknown", "submit was interrupted here; run it again to find the job"
    if state is not None:
        return _judge_running(evidence) if evidence.launcher_active else ("stopped", "run it again to resume")
    return "not started", f"runs after {' and '.join(evidence.needs)}" if evidence.needs else ""


def _judge_running(evidence: Evidence) -> tuple[str, str]:
    """The state of a stage with an allocation; before its first step, what it is doing."""
    queued = (events.Submitted, events.Requeued, events.Retried)
    started = (events.Stopping, events.Ready, events.Saved, events.Resumed, events.Started)
    event = evidence.history.last(*queued, *started)
    if isinstance(event, queued):
        return "starting", ""
    if isinstance(event, events.Stopping):
        return "running", f"saving before it stops: {event.reason}"
    if isinstance(event, events.Resumed):
        return "running", f"resuming from step {event.step}"
    return "running", "loading data and model" if isinstance(event, events.Started) else ""


def _judge_live(job: QueuedJob, evidence: Evidence) -> tuple[str, str]:
    """The state of a stage whose job is in Slurm's queue."""
    if job.state == "RUNNING":
        return _judge_running(evidence)
    if job.state != "PENDING":
        return job.state.lower(), job.reason
    if job.reason == "DependencyNeverSatisfied":
        return "stuck", "a stage that it needs has failed; to resume, run hpc-rlhf heal"
    if job.reason == "Dependency":
        return "waiting", f"for {' and '.join(evidence.needs)}"
    if isinstance(evidence.history.state, events.Retried):
        return "requeued", f"retry after {_ending(evidence)}"
    words = _REASONS.get(job.reason)
    state = "requeued" if evidence.history.last(events.Started) else "pending"
    return state, f"{job.reason}: {words}" if words else job.reason


def _ending(evidence: Evidence) -> str:
    """The reason and message of the latest attempt that ended without finishing."""
    ended = evidence.history.last(events.Ended)
    if ended is None:
        return "a stage that it needs was trained again"
    return ": ".join(filter(None, (ended.reason, ended.message)))
