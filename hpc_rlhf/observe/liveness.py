"""Tells whether anything but the user still works on a stage: a job, a sentinel or a launcher."""

from __future__ import annotations

import time

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import sentinel
from hpc_rlhf.run.events import Submitted
from hpc_rlhf.run.history import OUTCOMES, RETRYABLE, StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands

# Seconds between two queries to Slurm about one stage.
EVERY = 5.0
# `hpc-rlhf run` and healing touch the run's lock while they work.
_LOCK_SILENCE = 180.0


class StageWatch:
    """Watches for the end of a run's stages, to be asked repeatedly."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._next: dict[str, float] = {}

    def is_over(self, stage: str) -> bool:
        """Whether a stage ended and only the user would try it again.

        After a failure it is not over while a sentinel waits, or a launcher that may retry is running.
        """
        history = StageHistory.read(self._run, stage)
        state = history.state
        if state is None:
            return False
        failed = isinstance(state, RETRYABLE)
        if isinstance(state, OUTCOMES) and not failed:
            return True
        if time.monotonic() < self._next.get(stage, 0.0):
            return False
        self._next[stage] = time.monotonic() + EVERY
        if self._is_alive(stage, history.job_id, failed):
            return False
        return StageHistory.read(self._run, stage).state == state  # else it was retried while Slurm was asked

    def _is_alive(self, stage: str, job_id: str | None, failed: bool) -> bool:
        """Whether anything works on a stage, or will. If that cannot be known, a failure is the end."""
        if launcher_at_work(self._run):
            return True
        if job_id is None or not commands.available():
            return not failed
        try:
            queue = commands.queue()
        except HpcRlhfError:
            return True  # the controller will be back
        job = queue.get(job_id)
        if job is not None and job.live and job.is_of(stage):
            return True
        # A sentinel of any stage repairs the whole run.
        tokens = [event.token for event in Ledger(self._run.ledger).events() if isinstance(event, Submitted)]
        return bool(sentinel.living(queue, tokens))


def launcher_at_work(run: RunDir) -> bool:
    """Whether a process on any machine holds the run's lock."""
    try:
        return time.time() - run.submit_lock.stat().st_mtime < _LOCK_SILENCE
    except OSError:
        return False
