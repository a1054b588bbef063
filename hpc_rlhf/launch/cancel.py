"""Cancel a run's jobs."""

from __future__ import annotations

from hpc_rlhf import slurm
from hpc_rlhf.launch.jobs import find_live
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir
from hpc_rlhf.slurm import QueuedJob


def cancel(run: RunDir) -> dict[str, QueuedJob]:
    """Cancel every job of a run that is queued or running, and return them by stage."""
    with hold(run.submit_lock, "hpc-rlhf cancel"):
        live = find_live(run)
        slurm.cancel([job.job_id for job in live.values()])
        for stage, job in live.items():
            Ledger(run.ledger).append("cancelled", stage, job_id=job.job_id)
    return live
