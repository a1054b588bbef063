"""Submit a run's stages to Slurm as a graph of dependent jobs, or attach to the jobs that exist already. Without
submitting: which commands that would take, and when the jobs would start."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.chain import Chain, Outcome, require_slurm
from hpc_rlhf.launch.changes import refuse_changes
from hpc_rlhf.launch.jobs import find_jobs, submission_options
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Cancelled
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import is_full
from hpc_rlhf.spec.job import JobSpec

SOON = 5  # seconds that Slurm may take to estimate a start


def submit(
    spec: JobSpec, beside: Path | None = None, lent: Mapping[str, RunDir] | None = None,
    reused: Mapping[str, RunDir] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Submit every stage that is neither finished nor queued nor running.

    Args:
        beside, lent, reused: as ``prepare`` takes them; the runs of ``lent`` were submitted before.

    Raises:
        HpcRlhfError: there is no Slurm here, Slurm rejects a job, or the run directory belongs to another spec.
    """
    require_slurm()
    with claim(spec, "hpc-rlhf submit") as run:
        jobs = find_jobs(run)
        plan = prepare(spec, run, beside, live=bool(jobs.live), lent=lent, reused=reused)
        return _send_missing(Chain(plan, jobs, "person"))


def preview(plan: Plan, spec: JobSpec, beside: Path | None = None, reused: Collection[str] = ()) -> dict[str, str]:
    """The sbatch command of every stage that submit would send, if none of the run's jobs are live.

    Touches nothing.

    Args:
        reused: stages that would be taken from another run.

    Raises:
        HpcRlhfError: the run directory belongs to another spec.
    """
    templates = Templates(beside)
    refuse_changes(plan.run, spec, live=False)
    done = {job.stage for job in plan.jobs if job.stage in reused or manifest.is_done(plan.run.stage(job.stage))}
    calls = {}
    for job in plan.jobs:
        templates.script(plan, job, "true")
        templates.sentinel(plan, job)
        templates.ds_configs(job)
        if job.stage not in done:
            after = tuple(f"<{need}>" for need in job.needs if need not in done)
            options = submission_options(job, "<token>", after)
            calls[job.stage] = shlex.join(["sbatch", *options, str(plan.run.sbatch(job.stage))])
    return calls


def predicted_starts(plan: Plan, beside: Path | None = None) -> dict[str, str]:
    """When each stage that needs no other would start, or why Slurm gives no time; empty without Slurm.

    Raises:
        HpcRlhfError: a template does not render.
    """
    starts: dict[str, str] = {}
    if shutil.which("sbatch") is None:
        return starts
    templates = Templates(beside)
    with TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        path = Path(folder, "script")
        for job in plan.jobs:
            if job.needs:
                continue
            path.write_text(templates.script(plan, job, "true"), encoding="utf-8")
            try:
                start = predicted_start(path)
            except HpcRlhfError as error:
                starts[job.stage] = f"no start time ({error.message.splitlines()[-1]})"
                break  # the reason mostly holds for all stages
            starts[job.stage] = f"would start at {start}" if start else "no start time (Slurm gives none)"
    return starts


def predicted_start(script: Path) -> str | None:
    """When Slurm would start a script submitted now, such as 2026-05-01T09:30:00 by the controller's clock;
    None if it gives no time. Submits nothing.

    Raises:
        HpcRlhfError: it would be rejected, or Slurm does not respond soon.
    """
    start = re.search(r"to start at (\d[\dT:-]+)", commands.try_out(script, timeout=SOON))
    return start[1] if start else None


def _send_missing(chain: Chain) -> list[Outcome]:
    outcomes = []
    try:
        for job in chain.plan.jobs:
            if (settled := chain.settled(job)) is not None:
                outcomes.append(settled)
            elif job.stage in chain.jobs.live:
                outcomes.append(chain.attach(job))
            else:
                outcomes.append(chain.send_or_wait(job))
            _guard(chain, job)
        chain.submit_rest_later()
    except HpcRlhfError as error:
        raise _undone(chain, error) from error
    return outcomes


def _guard(chain: Chain, job: PlannedJob) -> None:
    """Give a stage its sentinel. The first stage needs one at once; others post it themselves if there is no room."""
    try:
        chain.guard(job)
    except HpcRlhfError as error:
        if not (is_full(error.message) and (chain.posted or chain.jobs.sentinels)):
            raise


def _undone(chain: Chain, error: HpcRlhfError) -> HpcRlhfError:
    """Cancel the jobs that this call has submitted: part of a graph is useless."""
    if not chain.sent:
        return error
    commands.cancel([*chain.posted, *chain.sent.values()])
    for stage, job_id in chain.sent.items():
        chain.ledger.append(Cancelled(stage, job_id=job_id))
    names = " and ".join(f"{stage} (job {job_id})" for stage, job_id in chain.sent.items())
    return HpcRlhfError(f"{error.message}; cancelled {names} again", error.where, error.hint)
