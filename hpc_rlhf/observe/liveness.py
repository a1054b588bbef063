"""Whether a stage's fate is settled, or somebody other than a person still goes on with it."""

from __future__ import annotations

import time

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import sentinel
from hpc_rlhf.run.events import Submitted
from hpc_rlhf.run.history import OUTCOMES, RETRYABLE, StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands

# Seconds between two questions to Slurm about one stage.
EVERY = 5.0
# `hpc-rlhf run` and whoever heals touch the run's lock while they are at work.
_LOCK_SILENCE = 180.0


class Fates:
    """The fates of a run's stages, to be asked for again and again."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._next: dict[str, float] = {}

    def is_settled(self, stage: str) -> bool:
        """Whether a stage ended, and only a person would try it again.

        A failure settles nothing while a sentinel waits, or a launcher that may retry is at work.
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
        if self._in_hand(stage, history.job_id, failed):
            return False
        return StageHistory.read(self._run, stage).state == state  # else it was retried while Slurm was asked

    def _in_hand(self, stage: str, job_id: str | None, failed: bool) -> bool:
        """Whether anybody is at work on a stage, or will be. Where that cannot be known, a bad ending is the end."""
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
    """Whether somebody on any machine holds the run."""
    try:
        return time.time() - run.submit_lock.stat().st_mtime < _LOCK_SILENCE
    except OSError:
        return False
