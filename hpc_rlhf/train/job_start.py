"""What rank 0 of a Slurm job sees to for the chain before its stage begins."""

from __future__ import annotations

import sys
from dataclasses import asdict

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import failures, sentinel
from hpc_rlhf.run.attempt_logs import AttemptLogs, last_seen, last_step
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands as slurm


def note_ending_before(run: RunDir, stage: str, job_id: str, restarts: int) -> None:
    """Write down how the job's attempt before ended, where that could not: Slurm requeued it.

    Args:
        restarts: how often the job has been requeued.
    """
    ledger = Ledger(run.ledger)
    events = list(ledger.events(stage))
    attempt = failures.latest_attempt(events)
    # After a `requeued` or `retried` everybody knows why this attempt is.
    if not restarts or not attempt or attempt[0]["event"] not in ("started", "submitted"):
        return
    if attempt[0].get("job_id") != job_id or any(e["event"] in ("ended", "finished") for e in attempt):
        return
    files = run.stage(stage)
    logs = AttemptLogs(files, job_id, restarts - 1)
    ending = failures.judge_requeued(events, logs, last_step(files))
    ledger.append("ended", stage, job_id=job_id, **asdict(ending), seen=last_seen(files))


def put_sentinel_back(run: RunDir, stage: str, job_id: str) -> None:
    """Submit the stage's sentinel anew, if somebody cancelled it. A stage can end well without, so nothing is raised."""
    sent = [
        e for e in Ledger(run.ledger).events(stage) if e["event"] == "submitted" and e["job_id"] == job_id
    ]
    if not sent:
        return
    try:
        if not sentinel.waits(slurm.queue(), sent[-1]["token"]):
            sentinel.post(run, stage, sent[-1]["token"], job_id)
    except HpcRlhfError as error:
        print(f"hpc-rlhf: this stage has no sentinel: {error.message}", file=sys.stderr, flush=True)
