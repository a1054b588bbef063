"""The status of each stage of a run: its state, its progress, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hpc_rlhf.observe.gather import Evidence, RunRecord, SlurmReply, query_slurm
from hpc_rlhf.observe.goodput.accounting import measure
from hpc_rlhf.observe.goodput.spans import Goodput
from hpc_rlhf.observe.judge import judge
from hpc_rlhf.observe.metrics import seconds_per_step, step_rows
from hpc_rlhf.run.attempt_logs import read_tail
from hpc_rlhf.run.events import Started
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import kind_of

# States whose time goes on, with an attempt at work or in the queue.
_AT_WORK = frozenset({"running", "completing", "stopping", "suspended", "signaling", "stage_out"})
_QUEUED = frozenset({"pending", "waiting", "requeued", "starting", "configuring", "requeue_hold"})


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


def read_status(run: RunDir, query: Callable[[Sequence[str]], SlurmReply] = query_slurm) -> list[StageStatus]:
    """The status of every stage of a run, in the order of its plan.

    Args:
        query: asks Slurm about jobs.

    Raises:
        HpcRlhfError: the plan cannot be read.
    """
    record = RunRecord.read(run)
    evidence = record.evidence(query(record.job_ids))
    statuses = [stage_status(run, stage, known) for stage, known in evidence.items()]
    goodput = measure(
        record.events,
        {planned.stage: planned.needs for planned in record.plan.stages},
        at_work={status.stage for status in statuses if status.state in _AT_WORK},
        queued={status.stage for status in statuses if status.state in _QUEUED},
        now=time.time(),
    )
    return [replace(status, goodput=goodput[status.stage]) for status in statuses]


def stage_status(run: RunDir, stage: str, evidence: Evidence) -> StageStatus:
    """The status of a stage, without its goodput; its progress is read from the end of its metrics."""
    state, why = judge(evidence)
    started = evidence.history.all(Started)
    status = StageStatus(stage, state, why, evidence.job_id, len(started))
    rows = step_rows(read_tail(run.stage(stage).metrics), stage)
    if not rows:
        return status
    row = rows[-1]
    numbers = {name: row.values[name] for name in kind_of(stage).progress if name in row.values}
    metric = next(iter(numbers), None)
    pace = None if evidence.done else seconds_per_step(rows, [event.time for event in started])
    return replace(
        status,
        step=row.step,
        total_steps=row.total_steps,
        metric=metric,
        value=numbers.get(metric or ""),
        numbers=numbers,
        updated=row.time,
        left=None if pace is None else round(pace * (row.total_steps - row.step), 1),
    )
