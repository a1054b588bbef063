"""What rank 0 of a Slurm job does for the chain before its stage begins."""

from __future__ import annotations

import sys
from dataclasses import replace

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import failures, sentinel
from hpc_rlhf.run.attempt_logs import AttemptLogs, last_seen, last_step
from hpc_rlhf.run.events import Ended, Finished, Started, Submitted
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands


def record_previous_end(run: RunDir, stage: str, job_id: str, restarts: int) -> None:
    """Record how the job's previous attempt ended, if Slurm requeued it before it could do so itself."""
    history = StageHistory.read(run, stage)
    attempt = history.attempt
    begin = next(iter(attempt.events), None)
    # After `requeued` or `retried` the ledger already has the reason for this attempt.
    if not restarts or not isinstance(begin, (Started, Submitted)) or begin.job_id != job_id:
        return
    if attempt.last(Ended, Finished) is not None:
        return
    files = run.stage(stage)
    logs = AttemptLogs(files, job_id, restarts - 1)
    ended = failures.judge_requeued(history, job_id, logs, last_step(files))
    Ledger(run.ledger).append(replace(ended, stage=stage, job_id=job_id, seen=last_seen(files)))


def restore_sentinel(run: RunDir, stage: str, job_id: str) -> None:
    """Submit the stage's sentinel again if somebody cancelled it. It raises nothing: the stage can do without."""
    token = StageHistory.read(run, stage).token(job_id)
    if token is None:
        return
    try:
        if not sentinel.waiting(commands.queue(), run, token, job_id):
            sentinel.post(run, stage, token, job_id, always=bool(sentinel.unsubmitted(run)))
    except HpcRlhfError as error:
        print(f"hpc-rlhf: this stage has no sentinel: {error.message}", file=sys.stderr, flush=True)
