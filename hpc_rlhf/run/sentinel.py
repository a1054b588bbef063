"""The sentinel of a stage: a small job that waits for the stage's job to fail, and then heals the chain.

Its comment has the token of the stage's own submission. So a sentinel that was never recorded is still found,
and rank 0 of the stage's next attempt can replace one that was cancelled. Where a submit plugin overwrites comments,
its script and the job that it waits for identify it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Submitted
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob


def post(run: RunDir, stage: str, token: str, job_id: str, always: bool = False) -> str:
    """Submit the sentinel of a stage's job, and return its id.

    Args:
        always: start it whenever the job has ended, not only when it has failed: other stages are to be submitted.

    Raises:
        HpcRlhfError: sbatch refused it.
    """
    when = "afterany" if always else "afternotok"
    options = [f"--comment={_mark(token)}", f"--dependency={when}:{job_id}"]
    try:
        return commands.submit(run.sentinel(stage), options)
    except HpcRlhfError:
        # sbatch may time out although the controller has accepted the job.
        accepted = waiting(commands.queue(), run, token, job_id)
        if not accepted:
            raise
        return accepted[-1].job_id


def unsubmitted(run: RunDir) -> list[str]:
    """The run's stages that are still to be submitted, because a limit on submitted jobs left no room."""
    stages = [path.stem for path in sorted(run.scripts.glob("*.sbatch")) if "." not in path.stem]
    missing = [stage for stage in stages if run.lender(stage) is None and not manifest.is_done(run.stage(stage))]
    return [stage for stage in missing if StageHistory.read(run, stage).last(Submitted) is None]


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
