"""Submit a run's stages to Slurm as a graph of dependent jobs, or attach to what is already there."""

from __future__ import annotations

import shlex
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_rlhf import manifest, slurm
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.jobs import adopt, find_live, submission_options, with_token
from hpc_rlhf.launch.plan import Plan, PlannedJob, make_plan
from hpc_rlhf.launch.prepare import claim, prepare, refuse_changes
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir
from hpc_rlhf.slurm import QueuedJob
from hpc_rlhf.spec.model import JobSpec


@dataclass(frozen=True)
class Outcome:
    """What submit did about a stage.

    Attributes:
        stage: the stage.
        did: submitted it, found it live, or found it done.
        job_id: its job; None when it is done.
        detail: Slurm's word on a live job.
    """

    stage: str
    did: Literal["submitted", "live", "done"]
    job_id: str | None = None
    detail: str = ""


def submit(spec: JobSpec, beside: Path | None = None) -> list[Outcome]:
    """Submit every stage that is neither done nor queued or running already.

    Args:
        spec: the job spec.
        beside: folder of the job file; templates in its ``templates/`` win over ours.

    Raises:
        HpcRlhfError: there is no Slurm here, Slurm refused a job, or the run directory belongs to another spec.
    """
    _require_slurm()
    plan, templates = make_plan(spec), Templates(beside)
    with claim(spec, "hpc-rlhf submit") as (run, _):
        live = find_live(run)
        prepare(spec, run, beside, live=bool(live))
        return _Submission(plan, templates, live).send()


def _require_slurm() -> None:
    """Raise HpcRlhfError unless Slurm answers: a job announced to a Slurm that is not there would be looked for ever after."""
    hint = "submit from a login node of the cluster, or run it here without Slurm: hpc-rlhf run FILE"
    if not slurm.available():
        raise HpcRlhfError("Slurm's commands are not on PATH", hint=hint)
    try:
        slurm.queue()
    except HpcRlhfError as error:
        raise HpcRlhfError(
            f"Slurm does not answer: {error.message}", hint=hint, exit_code=error.exit_code
        ) from error


def preview(spec: JobSpec, beside: Path | None = None) -> dict[str, str]:
    """The sbatch command of every stage that submit would send, were none of the run's jobs live. Touches nothing.

    Raises:
        HpcRlhfError: submit would refuse, because the run directory belongs to another spec.
    """
    plan, templates = make_plan(spec), Templates(beside)
    refuse_changes(plan.run, spec, live=False)
    commands = {}
    for job in plan.jobs:
        templates.script(plan, job, "true")
        templates.ds_configs(job, spec.stage(job.stage))
        if not is_done(plan.run, job.stage):
            after = tuple(f"<{need}>" for need in job.needs if not is_done(plan.run, need))
            options = submission_options(job, "<token>", after)
            commands[job.stage] = shlex.join(["sbatch", *options, str(plan.run.sbatch(job.stage))])
    return commands


def is_done(run: RunDir, stage: str) -> bool:
    """Whether a stage's artifact is whole. By its files' sizes: hashing a large model is left to the compute nodes,
    which do so before they train on it."""
    return manifest.defect(run.stage(stage).model, deep=False) is None


class _Submission:
    """One call of submit, under the run's lock."""

    def __init__(self, plan: Plan, templates: Templates, live: dict[str, QueuedJob]) -> None:
        self._plan, self._templates = plan, templates
        self._run = plan.run
        self._ledger = Ledger(plan.run.ledger)
        self._live = live
        self._ids = {stage: job.job_id for stage, job in live.items()}
        self._sent: dict[str, str] = {}

    def send(self) -> list[Outcome]:
        outcomes = []
        for job in self._plan.jobs:
            after = tuple(self._ids[need] for need in job.needs if not is_done(self._run, need))
            if is_done(self._run, job.stage):
                outcomes.append(Outcome(job.stage, "done"))
            elif job.stage in self._live:
                outcomes.append(self._attach(job, self._live[job.stage], after))
            else:
                self._ids[job.stage] = self._send(job, after)
                outcomes.append(Outcome(job.stage, "submitted", self._ids[job.stage]))
        return outcomes

    def _attach(self, job: PlannedJob, queued: QueuedJob, after: tuple[str, ...]) -> Outcome:
        """Leave a live job alone, except that one which waits for a dead job waits for the new one instead."""
        stale = queued.reason == "DependencyNeverSatisfied" or any(need in self._sent for need in job.needs)
        if queued.state == "PENDING" and stale:
            slurm.set_dependency(queued.job_id, after)
            return Outcome(job.stage, "live", queued.job_id, "PENDING, now waits for the new jobs")
        detail = f"{queued.state}, {queued.reason}" if queued.state == "PENDING" else queued.state
        return Outcome(job.stage, "live", queued.job_id, detail)

    def _send(self, job: PlannedJob, after: tuple[str, ...]) -> str:
        from hpc_rlhf.launch.executor import StageExecutor

        token = uuid.uuid4().hex[:16]
        executor = StageExecutor(self._plan, job, self._templates, token, after)
        self._ledger.append("submitting", job.stage, token=token)
        try:
            job_id = executor.send()
        except HpcRlhfError as error:
            # sbatch may give up waiting for an answer to a job that the controller has accepted.
            accepted = with_token(slurm.queue(), token)
            if accepted is None:
                self._ledger.append("refused", job.stage, token=token, message=error.message)
                raise self._undone(error) from error
            job_id = accepted.job_id
            adopt(self._run, job.stage, token, job_id)
        else:
            self._ledger.append("submitted", job.stage, token=token, job_id=job_id)
        self._sent[job.stage] = job_id
        return job_id

    def _undone(self, error: HpcRlhfError) -> HpcRlhfError:
        """Cancel what this call has sent: a part of a graph is of no use."""
        if not self._sent:
            return error
        slurm.cancel(list(self._sent.values()))
        for stage, job_id in self._sent.items():
            self._ledger.append("cancelled", stage, job_id=job_id)
        names = " and ".join(f"{stage} (job {job_id})" for stage, job_id in self._sent.items())
        return HpcRlhfError(f"{error.message}; cancelled {names} again", error.where, error.hint)
