"""The sentinel of a stage: a small job that waits for the stage's job to fail, and then heals the chain.

Its comment has the token of the stage's own submission. So a sentinel that was never recorded is still found,
and rank 0 of the stage's next attempt can replace one that was cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob


def post(run: RunDir, stage: str, token: str, job_id: str) -> str:
    """Submit the sentinel of a stage's job, and return its id.

    Raises:
        HpcRlhfError: sbatch refused it.
    """
    options = [f"--comment={_mark(token)}", f"--dependency=afternotok:{job_id}"]
    try:
        return commands.submit(run.sentinel(stage), options)
    except HpcRlhfError:
        # sbatch may time out although the controller has accepted the job.
        accepted = living(commands.queue(), [token])
        if not accepted:
            raise
        return accepted[-1].job_id


def living(queue: Mapping[str, QueuedJob], tokens: Iterable[str]) -> list[QueuedJob]:
    """The pending and running sentinels of some submissions."""
    marks = {_mark(token) for token in tokens}
    return [job for job in queue.values() if job.live and job.comment in marks]


def waits(queue: Mapping[str, QueuedJob], token: str) -> bool:
    """Whether a submission has a pending sentinel: a running one is about to end."""
    return any(job.state == "PENDING" for job in living(queue, [token]))


def _mark(token: str) -> str:
    return f"hpc-rlhf-sentinel:{token}"
