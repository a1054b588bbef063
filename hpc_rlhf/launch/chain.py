"""The jobs of a run as one chain: submitted, connected by dependencies, each with a sentinel."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.jobs import RunJobs, adopt, find_submission, submission_options
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.sweep_order import borrowed_jobs, jobs_before
from hpc_rlhf.run import manifest, sentinel
from hpc_rlhf.run.events import Refused, Submitted, Submitting
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.holds import find_hold
from hpc_rlhf.slurm.jobs import is_full


@dataclass(frozen=True)
class Outcome:
    """What was done for a stage.

    Attributes:
        did: submitted it, requeued it under its own id, found it live, found it done, left it stopped for the
            user, or left it to wait for a stage that is stopped.
        job_id: its job; None if it has none now.
        detail: Slurm's state of a live job, or the reason.
    """

    stage: str
    did: Literal["submitted", "requeued", "live", "done", "stopped", "waits"]
    job_id: str | None = None
    detail: str = ""


def require_slurm() -> None:
    """Raise HpcRlhfError unless Slurm answers: a job announced without it would be searched for indefinitely."""
    hint = "submit from a login node of the cluster, or run it here without Slurm: hpc-rlhf run FILE"
    if not commands.available():
        raise HpcRlhfError("Slurm's commands are not on PATH", hint=hint)
    try:
        commands.queue()
    except HpcRlhfError as error:
        raise HpcRlhfError(f"Slurm does not answer: {error.message}", hint=hint, exit_code=error.exit_code) from error


class Chain:
    """A run's jobs, for the process that holds the run's lock.

    Attributes:
        plan: the run's plan; its scripts are in the run directory.
        jobs: those that exist already.
        by: who submits jobs, for the ledger: the user (`person`) or heal.
        ids: the live job of each stage, including jobs submitted or requeued since, and the jobs of stages
            that another run of a sweep trains for this one.
        sent: the jobs submitted since, by stage.
        posted: the sentinels submitted since, and the jobs that they wait for.
    """

    def __init__(self, plan: Plan, jobs: RunJobs, by: Literal["person", "heal"]) -> None:
        self.plan, self.jobs, self.by = plan, jobs, by
        self.run, self.ledger = plan.run, Ledger(plan.run.ledger)
        borrowed = borrowed_jobs(self.run, [job.stage for job in plan.jobs])
        self.ids = {**borrowed, **{stage: job.job_id for stage, job in jobs.live.items()}}
        self.sent: dict[str, str] = {}
        self.posted: dict[str, str] = {}
        self._requeued: set[str] = set()
        self._tokens = dict(jobs.tokens)

    def after(self, job: PlannedJob) -> tuple[str, ...]:
        """The jobs that must succeed before a stage's own can start."""
        return tuple(self.ids[need] for need in job.needs if not manifest.is_done(self.run.stage(need)))

    def behind(self, job: PlannedJob) -> tuple[str, ...]:
        """The jobs of other runs that must end before a stage's own, because of the sweep's limit."""
        if any(self.run.lender(need) is None for need in job.needs):
            return ()  # a stage of its own run comes first, and waits for them
        return self._before

    @cached_property
    def _before(self) -> tuple[str, ...]:
        return jobs_before(self.run)

    def settled(self, job: PlannedJob) -> Outcome | None:
        """The outcome of a stage that is done, or that another run of the sweep trains; None for the others."""
        if manifest.is_done(self.run.stage(job.stage)):
            return Outcome(job.stage, "done")
        lender = self.run.lender(job.stage)
        if lender is None:
            return None
        job_id, where = self.ids.get(job.stage), f"that of {lender.path.name}"
        if job_id is None:
            return Outcome(job.stage, "waits", None, f"for {where} to be repaired")
        return Outcome(job.stage, "live", job_id, where)

    def attach(self, job: PlannedJob) -> Outcome:
        """Keep a live job. If Slurm holds it, release it; if it waits for a dead job, let it wait for the right one."""
        queued, after, behind = self.jobs.live[job.stage], self.after(job), self.behind(job)
        hold = find_hold(queued)
        if hold is not None and hold.by_slurm:
            commands.release(queued.job_id)
            return Outcome(job.stage, "live", queued.job_id, f"{hold.meaning}; released")
        moved = any(need in self.sent or need in self._requeued for need in job.needs)
        stale = queued.reason == "DependencyNeverSatisfied" or moved or {*after, *behind} - queued.needs
        if queued.state == "PENDING" and stale:
            commands.set_dependency(queued.job_id, after, behind)
            now = f"now waits for {' and '.join((*after, *behind))}" if after or behind else "now free to start"
            return Outcome(job.stage, "live", queued.job_id, f"PENDING, {now}")
        detail = f"{queued.state}, {queued.reason}" if queued.state == "PENDING" else queued.state
        return Outcome(job.stage, "live", queued.job_id, detail)

    def send(self, job: PlannedJob, delay: int = 0, without: Sequence[str] = ()) -> Outcome:
        """Submit a stage; ``delay`` and ``without`` are as in ``submission_options``.

        Raises:
            HpcRlhfError: sbatch refused it.
        """
        from hpc_rlhf.launch.executor import StageExecutor

        token = uuid.uuid4().hex[:16]
        options = submission_options(job, token, self.after(job), delay, without, self.behind(job))
        executor = StageExecutor(self.plan, job, options)
        self.ledger.append(Submitting(job.stage, token=token, by=self.by))
        try:
            job_id = executor.send()
        except HpcRlhfError as error:
            # sbatch may time out although the controller has accepted the job.
            accepted = find_submission(commands.queue(), self.run, job.stage, token, self._tokens)
            if accepted is None:
                self.ledger.append(Refused(job.stage, token=token, message=error.message))
                raise
            job_id = accepted.job_id
            adopt(self.run, job.stage, token, job_id)
        else:
            self.ledger.append(Submitted(job.stage, token=token, job_id=job_id))
        self.ids[job.stage] = self.sent[job.stage] = job_id
        self._tokens[job_id] = token
        return Outcome(job.stage, "submitted", job_id)

    def send_or_wait(self, job: PlannedJob) -> Outcome:
        """Submit a stage; where a limit on submitted jobs leaves no room, leave that to the sentinels of the others.

        Raises:
            HpcRlhfError: sbatch refused it, or there is no other stage with a sentinel.
        """
        missing = [need for need in job.needs if need not in self.ids and not manifest.is_done(self.run.stage(need))]
        if missing:
            return Outcome(job.stage, "waits", None, f"for {' and '.join(missing)} to be submitted")
        try:
            return self.send(job)
        except HpcRlhfError as error:
            healed = any(each.slurm.heal.enabled for each in self.plan.jobs if each.stage in self.ids)
            if not (is_full(error.message) and healed):
                raise
        return Outcome(job.stage, "waits", None, "to be submitted when another stage has ended: a limit is reached")

    def submit_rest_later(self) -> None:
        """Let the sentinels start whenever their stages have ended, if stages are still to be submitted."""
        if not sentinel.unsubmitted(self.run):
            return
        pending = {
            guard.job_id: job_id
            for job_id in self.ids.values()
            if (token := self._tokens.get(job_id)) is not None
            for guard in sentinel.waiting(self.jobs.queue, self.run, token, job_id)
        }
        for guard_id, job_id in {**pending, **self.posted}.items():
            commands.set_dependency(guard_id, (), (job_id,))

    def requeue(self, job: PlannedJob, job_id: str, delay: int, excluded: str | None) -> Outcome:
        """Put a finished job back in the queue under its own id.

        Args:
            delay: seconds before it may start.
            excluded: a host list of all nodes to exclude; None keeps the job's own.

        Raises:
            HpcRlhfError: Slurm refuses.
        """
        commands.requeue(job_id)
        self.ids[job.stage] = job_id
        self._requeued.add(job.stage)
        if after := self.after(job):
            commands.set_dependency(job_id, after)
        commands.delay_start(job_id, delay, excluded)
        return Outcome(job.stage, "requeued", job_id)

    def guard(self, job: PlannedJob) -> None:
        """Make sure that a live stage which is not done has a sentinel.

        Raises:
            HpcRlhfError: sbatch refused it.
        """
        job_id = self.ids.get(job.stage)
        elsewhere = self.run.lender(job.stage) is not None
        if elsewhere or not job.slurm.heal.enabled or job_id is None or manifest.is_done(self.run.stage(job.stage)):
            return
        token = self._tokens[job_id]
        if sentinel.waiting(self.jobs.queue, self.run, token, job_id):
            return
        try:
            self.posted[sentinel.post(self.run, job.stage, token, job_id)] = job_id
        except HpcRlhfError as error:
            raise HpcRlhfError(
                f"the sentinel was refused: {error.message}",
                where=f"stages.{job.stage}.slurm.heal",
                hint="give it what the site requires, such as gres: gpu:1, time: 10 or another partition, or set "
                "enabled: false",
            ) from error
