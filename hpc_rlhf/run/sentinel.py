"""The sentinel of a stage: a small job that waits for the stage's job to fail, and then heals the chain.

Its comment has the token of the stage's own submission. So a sentinel that was never recorded is still found,
and rank 0 of the stage's next attempt can replace one that was cancelled. Where a submit plugin overwrites comments,
its script and the job that it waits for identify it.
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
        accepted = waiting(commands.queue(), run, token, job_id)
        if not accepted:
            raise
        return accepted[-1].job_id


def living(queue: Mapping[str, QueuedJob], run: RunDir, tokens: Iterable[str]) -> list[QueuedJob]:
    """The pending and running sentinels of a run, to which ``tokens`` were given."""
    marks = {_mark(token) for token in tokens}

    def is_ours(job: QueuedJob) -> bool:
        return job.comment in marks or (job.is_of("sentinel") and job.is_from(run.path))

    return [job for job in queue.values() if job.live and is_ours(job)]


def waiting(queue: Mapping[str, QueuedJob], run: RunDir, token: str, job_id: str) -> list[QueuedJob]:
    """The pending sentinels of one submission, which has a job id: a running one is about to end."""
    pending = (job for job in living(queue, run, [token]) if job.state == "PENDING")
    return [job for job in pending if job.comment == _mark(token) or job_id in job.needs]


def _mark(token: str) -> str:
    return f"hpc-rlhf-sentinel:{token}"
