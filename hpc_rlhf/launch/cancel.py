"""Cancel a run's jobs."""

from __future__ import annotations

from hpc_rlhf.launch.jobs import find_jobs
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.run.events import Cancelled
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob

# A running sentinel finishes soon.
_PATIENCE = 30.0


def cancel(run: RunDir) -> dict[str, QueuedJob]:
    """Cancel every queued or running job of a run, and return those of stages."""
    with hold(run.submit_lock, "hpc-rlhf cancel", _PATIENCE):
        jobs = find_jobs(run)
        # The sentinels first, or they would start when their stages are cancelled.
        commands.cancel([job.job_id for job in jobs.sentinels])
        commands.cancel([job.job_id for job in jobs.live.values()])
        for stage, job in jobs.live.items():
            Ledger(run.ledger).append(Cancelled(stage, job_id=job.job_id))
    return jobs.live
