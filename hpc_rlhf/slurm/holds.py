"""Why Slurm holds a job, and who may release it."""

from __future__ import annotations

import re
from typing import NamedTuple

from hpc_rlhf.slurm.jobs import QueuedJob


class Hold(NamedTuple):
    """A hold: what it means, and whether Slurm made it by itself, so that healing releases it."""

    meaning: str
    by_slurm: bool = False

    @property
    def advice(self) -> str:
        """The meaning, and what helps."""
        return f"{self.meaning}; to release it, run hpc-rlhf heal" if self.by_slurm else self.meaning


_TOO_OFTEN = Hold("Slurm requeued it too often (MaxBatchRequeue)", by_slurm=True)
_BY_REASON = {
    "launch failed requeued held": Hold("a node failed to launch it", by_slurm=True),
    "user env retrieval failed requeued held": Hold("a node failed to set up its environment", by_slurm=True),
    "launch failure limit exceeded requeued held": _TOO_OFTEN,
    "jobholdmaxrequeue": _TOO_OFTEN,
    "job requeued in held state": Hold("requeued by hand and held; to release it: scontrol release"),
    "jobhelduser": Hold("held by its owner; to release it: scontrol release"),
    "jobheldadmin": Hold("held by an administrator"),
}
_STATES = {"PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT"}


def find_hold(job: QueuedJob) -> Hold | None:
    """Why a job is held; None if it is not.

    Slurm writes a reason with underscores or, depending on version and command, with spaces.
    """
    reason = re.sub(r"[\s_]+", " ", job.reason).strip(" ()").lower()
    hold = _BY_REASON.get(reason) if job.state in _STATES else None
    if hold is None and job.state in _STATES - {"PENDING"}:
        return Hold("Slurm requeued it and holds it", by_slurm=job.state == "REQUEUE_HOLD")
    return hold
