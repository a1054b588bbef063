"""Gather what is known about a run: its plan, ledger, lock and artifacts on disk, and its jobs in Slurm."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Event
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import JobRecord, QueuedJob

# Seconds; `hpc-rlhf run` and healing touch the run's lock more often while they work.
_LOCK_SILENCE = 180.0
_SLURM_EVERY = 15.0  # seconds


@dataclass(frozen=True)
class PlannedStage:
    """A stage as planned.

    Attributes:
        needs: stages whose artifacts it starts from.
        global_batch: samples in a step, over all ranks.
    """

    stage: str
    needs: tuple[str, ...]
    global_batch: int


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run, as read back from its directory."""

    name: str
    stages: tuple[PlannedStage, ...]

    @classmethod
    def read(cls, run: RunDir) -> RunPlan:
        """Read a run's plan.json.

        Raises:
            HpcRlhfError: it cannot be read.
        """
        try:
            plan = json.loads(run.plan_json.read_text(encoding="utf-8"))
            jobs = [PlannedStage(job["stage"], tuple(job["needs"]), job["batch"]["global"]) for job in plan["jobs"]]
            return cls(str(plan["name"]), tuple(jobs))
        except (OSError, ValueError, LookupError, TypeError) as error:
            hint = "submit or run the job file again to rewrite it"
            raise unreadable("the plan", run.plan_json, error, hint) from error


def unreadable(what: str, path: Path, cause: Exception, hint: str) -> HpcRlhfError:
    """The error that a file of a run cannot be read, or is damaged."""
    reason = cause.strerror if isinstance(cause, OSError) else "it is damaged"
    return HpcRlhfError(f"cannot read {what}: {reason}", where=str(path), hint=hint, exit_code=RUN_FAILED)


@dataclass(frozen=True)
class SlurmReply:
    """What Slurm knows about some jobs.

    Attributes:
        queue: jobs in the queue, by id.
        past: jobs in the accounting database, by id.
        error: why Slurm does not answer; empty if it does.
    """

    queue: Mapping[str, QueuedJob] = field(default_factory=dict)
    past: Mapping[str, JobRecord] = field(default_factory=dict)
    error: str = ""


def query_slurm(job_ids: Sequence[str], owner: str | None = None) -> SlurmReply:
    """What Slurm knows about some jobs of this user or of another one, with at most two commands."""
    if not job_ids:
        return SlurmReply()
    try:
        queue = commands.queue() if owner is None else commands.queue(owner)
    except HpcRlhfError as error:
        return SlurmReply(error=f"Slurm does not answer ({error.message})")
    return SlurmReply(queue, commands.accounting([job_id for job_id in job_ids if job_id not in queue]))


class SlurmWatch:
    """What Slurm knows about jobs, for a display that refreshes often: Slurm's controller is shared.

    Args:
        owner: as ``query_slurm`` takes it.

    Attributes:
        reply: the latest.
    """

    def __init__(self, owner: str | None = None) -> None:
        self.reply = SlurmReply()
        self._owner = owner
        self._queried = -math.inf
        self._jobs: frozenset[str] = frozenset()

    def query(self, job_ids: Sequence[str]) -> SlurmReply:
        """The reply about some jobs, new if the latest is older than 15 seconds or lacks one of them."""
        if time.monotonic() - self._queried > _SLURM_EVERY or not self._jobs.issuperset(job_ids):
            self.reply = query_slurm(job_ids, self._owner)
            self._queried, self._jobs = time.monotonic(), frozenset(job_ids)
        return self.reply


@dataclass(frozen=True)
class Evidence:
    """All that is known about the state of a stage.

    Attributes:
        done: its artifact is complete.
        needs: stages that it starts from.
        job_id: its latest Slurm job, or None.
        queued: that job in the queue.
        past: that job in the accounting database.
        launcher_active: a launcher on this or another machine holds the run.
        slurm_error: why Slurm does not answer; empty if it does.
    """

    done: bool
    needs: tuple[str, ...]
    history: StageHistory
    job_id: str | None
    queued: QueuedJob | None
    past: JobRecord | None
    launcher_active: bool
    slurm_error: str = ""


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about its stages, without Slurm."""

    run: RunDir
    plan: RunPlan
    events: Sequence[Event]
    histories: Mapping[str, StageHistory]
    done: frozenset[str]

    @classmethod
    def read(cls, run: RunDir, plan: RunPlan | None = None, events: Sequence[Event] | None = None) -> RunRecord:
        """Read a run directory.

        Args:
            plan, events: what was already read of it.

        Raises:
            HpcRlhfError: the plan cannot be read.
        """
        plan = RunPlan.read(run) if plan is None else plan
        events = list(Ledger(run.ledger).events()) if events is None else events
        histories = {}
        for stage in (planned.stage for planned in plan.stages):
            lender = run.lender(stage)
            own = StageHistory([event for event in events if event.stage == stage])
            histories[stage] = own if lender is None else StageHistory.read(lender, stage)
        done = frozenset(stage for stage in histories if manifest.is_done(run.stage(stage)))
        return cls(run, plan, events, histories, done)

    @property
    def job_ids(self) -> list[str]:
        """The Slurm jobs of the stages that are not done."""
        jobs = {stage: history.job_id for stage, history in self.histories.items()}
        return [job_id for stage, job_id in jobs.items() if job_id is not None and stage not in self.done]

    def evidence(self, reply: SlurmReply) -> dict[str, Evidence]:
        """The evidence about each stage, in the order of the plan."""
        at_work = launcher_at_work(self.run)
        evidence = {}
        for planned in self.plan.stages:
            stage, history = planned.stage, self.histories[planned.stage]
            queued = reply.queue.get(history.job_id or "")
            evidence[stage] = Evidence(
                done=stage in self.done,
                needs=planned.needs,
                history=history,
                job_id=history.job_id,
                queued=queued if queued is not None and queued.is_of(stage) else None,
                past=reply.past.get(history.job_id or ""),
                launcher_active=at_work,
                slurm_error=reply.error,
            )
        return evidence


def launcher_at_work(run: RunDir) -> bool:
    """Whether a process on any machine holds the run's lock."""
    try:
        return time.time() - run.submit_lock.stat().st_mtime < _LOCK_SILENCE
    except OSError:
        return False
