"""Which of a run's jobs are alive, told from the ledger and Slurm together.

Every call of sbatch is announced in the ledger with a token that the job carries in its comment. So a job whose
id was never written down, because the submitting process died, is still found, and taken on.
"""

from __future__ import annotations

import time

from hpc_rlhf import slurm
from hpc_rlhf.launch.plan import PlannedJob
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir
from hpc_rlhf.slurm import QueuedJob

# An sbatch whose parent was killed may still be talking to the controller; it gives up after about this long.
_STILL_ON_ITS_WAY = 10.0


def submission_options(job: PlannedJob, token: str, after: tuple[str, ...]) -> list[str]:
    """sbatch options that belong to one submission. They stay out of the script, which is the same every time.

    Args:
        job: the stage's job.
        token: marks this very submission in the job's comment.
        after: ids of jobs that must end well first.
    """
    words = [_mark(token), *([job.slurm.comment] if job.slurm.comment else [])]
    dependency = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    return [f"--comment={' '.join(words)}", *dependency]


def find_live(run: RunDir) -> dict[str, QueuedJob]:
    """The run's jobs that are queued or running, by stage. Takes on those whose id was never written down."""
    ledger = Ledger(run.ledger)
    ids, unanswered = _submissions(ledger)
    if not ids and not unanswered:
        return {}
    queue = slurm.queue()
    for token, (stage, announced) in unanswered.items():
        while (job := with_token(queue, token)) is None and time.time() < announced + _STILL_ON_ITS_WAY:
            time.sleep(1)
            queue = slurm.queue()
        if job is not None:
            adopt(run, stage, token, job.job_id)
            ids[job.job_id] = stage
    found = ((stage, queue[job_id]) for job_id, stage in ids.items() if job_id in queue)
    return {stage: job for stage, job in found if job.live and job.is_of(stage)}


def adopt(run: RunDir, stage: str, token: str, job_id: str) -> None:
    """Take on a job that Slurm has accepted without our having heard so."""
    from hpc_rlhf.launch.executor import ensure_pickle

    ensure_pickle(run, stage, job_id)
    Ledger(run.ledger).append("submitted", stage, token=token, job_id=job_id)


def with_token(queue: dict[str, QueuedJob], token: str) -> QueuedJob | None:
    """The job of one submission."""
    return next((job for job in queue.values() if job.comment.split(" ")[0] == _mark(token)), None)


def _mark(token: str) -> str:
    return f"hpc-rlhf:{token}"


def _submissions(ledger: Ledger) -> tuple[dict[str, str], dict[str, tuple[str, float]]]:
    """The stage of every known job id, and the stage and time of every token that has no answer."""
    ids: dict[str, str] = {}
    unanswered: dict[str, tuple[str, float]] = {}
    for event in ledger.events():
        if event["event"] == "submitting":
            unanswered[event["token"]] = (event["stage"], event["time"])
        elif event["event"] == "submitted":
            unanswered.pop(event["token"], None)
            ids[event["job_id"]] = event["stage"]
        elif event["event"] == "refused":
            unanswered.pop(event["token"], None)
    return ids, unanswered
