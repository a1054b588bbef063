"""How the stages of a run are getting on: what Slurm says, and what is on disk, which outranks it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.observe.goodput import totals
from hpc_rlhf.observe.goodput.spans import Goodput
from hpc_rlhf.observe.liveness import launcher_at_work
from hpc_rlhf.observe.metrics import seconds_a_step, step_rows
from hpc_rlhf.run import manifest
from hpc_rlhf.run.attempt_logs import read_tail
from hpc_rlhf.run.events import (
    Cancelled,
    Ended,
    Event,
    Failed,
    Interrupted,
    Ready,
    Refused,
    Requeued,
    Resumed,
    Retried,
    Saved,
    Started,
    Stopped,
    Stopping,
    Submitted,
    Submitting,
)
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import ENDED, JobRecord, QueuedJob
from hpc_rlhf.spec.stages import kind_of

_AT_WORK = frozenset({"running", "completing", "stopping", "suspended", "signaling", "stage_out"})
_QUEUED = frozenset({"pending", "waiting", "requeued", "starting", "configuring", "requeue_hold"})
_REASONS = {
    "Priority": "other jobs go first",
    "Resources": "waits for free nodes",
    "BeginTime": "Slurm lets a requeued job wait a little",
    "JobHeldUser": "held by its owner; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "launch_failed_requeued_held": "a node failed to launch it; scontrol release lets it go",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "time is longer than the partition allows",
    "PartitionNodeLimit": "more nodes than the partition has",
    "ReqNodeNotAvail": "a node that it needs is not available",
    "Reservation": "waits for its reservation",
}


@dataclass(frozen=True)
class StageStatus:
    """How one stage is getting on.

    Attributes:
        stage: the stage.
        state: in a word: not started, waiting, pending, starting, running, requeued, stuck, done, failed, …
        why: more about the state; may be empty.
        job_id: its latest Slurm job, or None.
        attempts: how often it has started.
        step: steps done, or None before the first.
        total_steps: steps in all.
        metric: name of the number that tells most: loss, or PPO's reward.
        value: its latest value.
        numbers: the latest values of all that tell, by name; null where one was not finite.
        updated: when the latest step was done, in Unix seconds.
        left: seconds of work that the remaining steps take at the pace of the last ones, without any time in a queue;
            None where that cannot be told, and for a stage that is done.
        goodput: what became of its time, and what interrupted it.
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


@dataclass(frozen=True)
class Evidence:
    """All that is known about the state of a stage."""

    done: bool
    needs: tuple[str, ...]
    history: StageHistory
    job_id: str | None
    queued: QueuedJob | None
    past: JobRecord | None
    at_work_here: bool


# What Slurm says: the jobs that it has, those that it remembers, and what is wrong when it does not answer.
Answer = tuple[Mapping[str, QueuedJob], Mapping[str, JobRecord], str]


def ask_slurm(job_ids: Sequence[str]) -> Answer:
    """What Slurm knows of some jobs, in two questions at most."""
    if not job_ids:
        return {}, {}, ""
    try:
        queue = commands.queue()
    except HpcRlhfError as error:
        return {}, {}, f"no word from Slurm ({error.message})"
    return queue, commands.accounting([job_id for job_id in job_ids if job_id not in queue]), ""


def read_status(run: RunDir, ask: Callable[[Sequence[str]], Answer] = ask_slurm) -> list[StageStatus]:
    """The status of every stage of a run, in the order of its plan.

    Args:
        ask: what Slurm says of the jobs of the stages that are not done.

    Raises:
        HpcRlhfError: the plan cannot be read.
    """
    plan = read_plan(run)
    ledger = list(Ledger(run.ledger).events())
    evidence, silence = gather(run, plan, ledger, ask)
    statuses = []
    for stage, known in evidence.items():
        state, why = judge(known)
        if silence and known.job_id is not None and not known.done:
            why = silence
        starts = [event.time for event in known.history.all(Started)]
        seen = _progress(run.stage(stage).metrics, stage, starts, known.done)
        statuses.append(StageStatus(stage, state, why, known.job_id, len(starts), **seen))
    return _with_goodput(statuses, ledger, plan)


def gather(
    run: RunDir,
    plan: Mapping[str, Any],
    ledger: Sequence[Event],
    ask: Callable[[Sequence[str]], Answer] = ask_slurm,
) -> tuple[dict[str, Evidence], str]:
    """What is known of every stage of a plan, and what is wrong where Slurm does not answer.

    Args:
        ledger: the run's events.
        ask: what Slurm says of the jobs of the stages that are not done.
    """
    histories = {}
    for planned in plan["jobs"]:
        stage = planned["stage"]
        lender = run.lender(stage)
        own = StageHistory([event for event in ledger if event.stage == stage])
        histories[stage] = own if lender is None else StageHistory.read(lender, stage)
    done = {stage: manifest.is_done(run.stage(stage)) for stage in histories}
    jobs = {stage: history.job_id for stage, history in histories.items()}
    queue, past, silence = ask(
        [job_id for stage, job_id in jobs.items() if job_id is not None and not done[stage]]
    )
    at_work = launcher_at_work(run)
    evidence = {}
    for planned in plan["jobs"]:
        stage = planned["stage"]
        queued = queue.get(jobs[stage] or "")
        evidence[stage] = Evidence(
            done=done[stage],
            needs=tuple(planned["needs"]),
            history=histories[stage],
            job_id=jobs[stage],
            queued=queued if queued is not None and queued.is_of(stage) else None,
            past=past.get(jobs[stage] or ""),
            at_work_here=at_work,
        )
    return evidence, silence


def _with_goodput(
    statuses: list[StageStatus], ledger: list[Event], plan: dict[str, Any]
) -> list[StageStatus]:
    measured = totals.measure(
        ledger,
        {job["stage"]: job["needs"] for job in plan["jobs"]},
        at_work={status.stage for status in statuses if status.state in _AT_WORK},
        queued={status.stage for status in statuses if status.state in _QUEUED},
        now=time.time(),
    )
    return [replace(status, goodput=measured[status.stage]) for status in statuses]


def read_plan(run: RunDir) -> dict[str, Any]:
    """The plan of a run.

    Raises:
        HpcRlhfError: it cannot be read.
    """
    try:
        plan = json.loads(run.plan_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise HpcRlhfError(
            f"cannot read the plan: {reason}",
            where=str(run.plan_json),
            hint="submit and run write it anew",
            exit_code=RUN_FAILED,
        ) from error
    assert isinstance(plan, dict)
    return plan


def judge(evidence: Evidence) -> tuple[str, str]:
    """The state of a stage in a word, and why. A whole artifact outranks Slurm, and Slurm what was last written."""
    if evidence.done:
        return "done", ""
    if evidence.queued is not None and evidence.queued.live:
        return _judge_live(evidence.queued, evidence)
    state = evidence.history.state
    if isinstance(state, (Failed, Refused)):
        return state.name, state.message
    if isinstance(state, Cancelled):
        return state.name, ""
    if isinstance(state, Stopped):
        return state.name, f"{state.message}; once that is mended, hpc-rlhf heal goes on"
    if isinstance(state, Ended):
        return "failed", _how_it_ended(evidence)
    if isinstance(state, Interrupted):
        return "interrupted", "run it again to go on"
    ended = evidence.queued or evidence.past
    if ended is not None and not (isinstance(ended, JobRecord) and ended.state not in ENDED):
        name = "cancelled" if ended.state == "CANCELLED" else "failed"
        return name, f"Slurm says {ended.state}; hpc-rlhf heal goes on"
    if evidence.job_id is not None:
        return "unknown", f"Slurm knows no job {evidence.job_id} now; hpc-rlhf heal goes on"
    if isinstance(state, Submitting):
        return "unknown", "submit was cut off here; submit again finds the job"
    if state is not None:
        return _at_work(evidence) if evidence.at_work_here else ("stopped", "run it again to go on")
    return "not started", f"comes after {' and '.join(evidence.needs)}" if evidence.needs else ""


def _at_work(evidence: Evidence) -> tuple[str, str]:
    """Of a stage whose job runs: what it does until its first step."""
    event = evidence.history.last(Submitted, Requeued, Retried, Stopping, Ready, Saved, Resumed, Started)
    if isinstance(event, (Submitted, Requeued, Retried)):
        return "starting", ""
    if isinstance(event, Stopping):
        return "running", f"saving before it stops: {event.reason}"
    if isinstance(event, Resumed):
        return "running", f"going on from step {event.step}"
    return "running", "loading data and model" if isinstance(event, Started) else ""


def _judge_live(job: QueuedJob, evidence: Evidence) -> tuple[str, str]:
    if job.state == "RUNNING":
        return _at_work(evidence)
    if job.state != "PENDING":
        return job.state.lower(), job.reason
    if job.reason == "DependencyNeverSatisfied":
        return "stuck", "a stage that it needs ended badly; hpc-rlhf heal mends it"
    if job.reason == "Dependency":
        return "waiting", f"for {' and '.join(evidence.needs)}"
    if isinstance(evidence.history.state, Retried):
        return "requeued", f"tried again after {_how_it_ended(evidence)}"
    words = _REASONS.get(job.reason)
    state = "requeued" if evidence.history.last(Started) else "pending"
    return state, f"{job.reason}: {words}" if words else job.reason


def _how_it_ended(evidence: Evidence) -> str:
    """The reason and the line of a stage's last ending that was judged."""
    ended = evidence.history.last(Ended)
    return ": ".join(filter(None, (ended.reason, ended.message))) if ended else "what it needs came again"


def _progress(metrics: Path, stage: str, starts: Sequence[float], done: bool) -> dict[str, Any]:
    """What the last lines of a metrics file say."""
    rows = step_rows(read_tail(metrics), stage)
    if not rows:
        return {}
    row = rows[-1]
    numbers = {name: row[name] for name in kind_of(stage).progress if name in row}
    name = next(iter(numbers), None)
    pace = None if done else seconds_a_step(rows, starts)
    return {
        "step": row["step"],
        "total_steps": row["total_steps"],
        "metric": name,
        "value": numbers.get(name or ""),
        "numbers": numbers,
        "updated": row.get("time"),
        "left": None if pace is None else round(pace * (row["total_steps"] - row["step"]), 1),
    }
