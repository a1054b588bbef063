"""The status of each stage of a run: its state, its progress, and where its time went.

The state is judged from what is known: a complete artifact outranks Slurm, and Slurm outranks what the ledger says
last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hpc_rlhf.errors import STOPPED_EARLY
from hpc_rlhf.observe.gather import Evidence, RunRecord, SlurmReply, query_slurm
from hpc_rlhf.observe.goodput.accounting import measure
from hpc_rlhf.observe.goodput.spans import Goodput
from hpc_rlhf.observe.metrics import held_out_rows, seconds_per_step, step_rows
from hpc_rlhf.run import acting, events, reasons
from hpc_rlhf.run.attempt_logs import read_tail
from hpc_rlhf.run.format import listed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import SourceCounts, stage_counts
from hpc_rlhf.slurm.holds import find_hold
from hpc_rlhf.slurm.jobs import ENDED, JobRecord, QueuedJob, is_full
from hpc_rlhf.spec.stages import kind_of

# States whose time goes on, with an attempt at work or in the queue.
_AT_WORK = frozenset({"running", "completing", "stopping", "suspended", "signaling", "stage_out"})
_QUEUED = frozenset({"pending", "waiting", "requeued", "starting", "configuring", "held"})
# What Slurm's pending reasons mean, besides holds.
_REASONS = {
    "Priority": "other jobs have a higher priority",
    "Resources": "waiting for free nodes",
    "BeginTime": "Slurm delays a requeued job",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "its time limit exceeds the partition's",
    "PartitionNodeLimit": "it needs more nodes than the partition has",
    "ReqNodeNotAvail": "a required node is unavailable",
    "Reservation": "waiting for its reservation",
}


@dataclass(frozen=True)
class StageStatus:
    """The status of one stage.

    Attributes:
        state: not started, waiting, pending, starting, running, requeued, stuck, done, failed, …
        why: more about the state; may be empty.
        job_id: its latest Slurm job, or None.
        attempts: how often it has started.
        step, total_steps: steps done, or None before the first, and steps in all.
        metric, value: the most important metric, such as loss, or PPO's reward, and its latest value.
        numbers: the latest values of all progress metrics, by name; null for one that was not finite.
        updated: when the latest step was done, in Unix seconds.
        left: seconds of work left at the pace of the latest steps, without time in a queue; None if unknown or done.
        goodput: where its time went, and what interrupted it.
        data: what became of the rows of each source of its data; empty until they are tokenized.
        held_out: the metrics of its latest evaluation on held-out data, its ``step``, and with keep_best the
            ``best_step`` so far; empty without one.
    """

    stage: str
    state: str
    why: str = ""
    job_id: str | None = None
    attempts: int = 0
    step: int | None = None
    total_steps: int | None = None
    metric: str | None = None
    value: float | None = None
    numbers: dict[str, float | None] = field(default_factory=dict)
    updated: float | None = None
    left: float | None = None
    goodput: Goodput = field(default_factory=Goodput)
    data: tuple[SourceCounts, ...] = ()
    held_out: dict[str, float | None] = field(default_factory=dict)


def read_status(run: RunDir, query: Callable[[Sequence[str]], SlurmReply] | None = None) -> list[StageStatus]:
    """The status of every stage of a run, in the order of its plan.

    Args:
        query: asks Slurm about jobs; by default about those of the run's owner.

    Raises:
        HpcRlhfError: the plan cannot be read.
    """
    record = RunRecord.read(run)
    query = query or partial(query_slurm, owner=acting.other_owner(run))
    return run_statuses(record, record.evidence(query(record.job_ids)))


def run_statuses(record: RunRecord, evidence: Mapping[str, Evidence]) -> list[StageStatus]:
    """The status of every stage of a run, in the order of its plan."""
    statuses = [stage_status(record.run, stage, known) for stage, known in evidence.items()]
    goodput = run_goodput(record, {status.stage: status.state for status in statuses})
    return [replace(status, goodput=goodput[status.stage]) for status in statuses]


def run_goodput(record: RunRecord, states: Mapping[str, str]) -> dict[str, Goodput]:
    """Where the time of each stage of a run went, from the states of its stages."""
    return measure(
        record.events,
        {planned.stage: planned.needs for planned in record.plan.stages},
        at_work={stage for stage, state in states.items() if state in _AT_WORK},
        queued={stage for stage, state in states.items() if state in _QUEUED},
        now=time.time(),
    )


def stage_status(run: RunDir, stage: str, evidence: Evidence) -> StageStatus:
    """A stage's status without its goodput; its progress is read from the end of its metrics."""
    state, why = judge(evidence)
    started = evidence.history.all(events.Started)
    counts = tuple(stage_counts(run.stage(stage)))
    status = StageStatus(stage, state, why, evidence.job_id, len(started), data=counts)
    text = read_tail(run.stage(stage).metrics)
    rows = step_rows(text, stage)
    if not rows:
        return status
    row = rows[-1]
    evaluated = held_out_rows(text)[-1:] if kind_of(stage).trains else []
    numbers = {name: row.values[name] for name in kind_of(stage).shown(row.values)}
    metric = next(iter(numbers), None)
    pace = None if evidence.done else seconds_per_step(rows, [event.time for event in started])
    return replace(
        status,
        step=row.step,
        total_steps=row.total_steps,
        metric=metric,
        value=numbers.get(metric or ""),
        numbers=numbers,
        held_out={name: value for each in evaluated for name, value in [("step", each.step), *each.values.items()]},
        updated=row.time,
        left=None if pace is None else round(pace * (row.total_steps - row.step), 1),
    )


def judge(evidence: Evidence) -> tuple[str, str]:
    """A stage's state, and the reason for it, which may be empty."""
    state, why = _judge(evidence)
    unknown = evidence.slurm_error and evidence.job_id is not None and not evidence.done
    return state, evidence.slurm_error if unknown else why


def _judge(evidence: Evidence) -> tuple[str, str]:
    if evidence.done:
        return "done", ""
    if evidence.queued is not None and evidence.queued.live:
        return _judge_live(evidence.queued, evidence)
    state = evidence.history.state
    if isinstance(state, events.Refused) and is_full(state.message):
        return "waiting", "to be submitted when another stage has ended: a limit on jobs is reached"
    if isinstance(state, events.Failed) and state.exit_code == STOPPED_EARLY:
        return "stopped", f"early: {state.message}"
    if isinstance(state, (events.Failed, events.Refused)):
        return state.name, state.message
    if isinstance(state, events.Cancelled):
        return state.name, ""
    if isinstance(state, events.Stopped):
        return state.name, f"{state.message}; fix the cause, then run hpc-rlhf heal"
    if isinstance(state, events.Ended):
        return "stopped" if state.reason == reasons.STOPPED_EARLY else "failed", _ending(evidence)
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
    return "not started", f"runs after {listed(evidence.needs)}" if evidence.needs else ""


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
    if (hold := find_hold(job)) is not None:
        return "held", f"{job.reason}: {hold.advice}" if job.reason else hold.advice
    if job.state != "PENDING":
        return job.state.lower(), job.reason
    if job.reason == "DependencyNeverSatisfied":
        return "stuck", "a stage that it needs has failed; to resume, run hpc-rlhf heal"
    if job.reason == "Dependency":
        return "waiting", f"for {listed(evidence.needs)}"
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
