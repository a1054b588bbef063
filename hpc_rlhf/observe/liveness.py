"""Whether a stage's fate is settled, or somebody other than a person still goes on with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.turns import BAD, ENDINGS, last_turn
from hpc_rlhf.run import sentinel
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands as slurm

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
        events = self._events(stage)
        turn = last_turn(events)
        if turn is None:
            return False
        if turn["event"] in ENDINGS - BAD:
            return True
        if time.monotonic() < self._next.get(stage, 0.0):
            return False
        self._next[stage] = time.monotonic() + EVERY
        if self._in_hand(stage, events, turn["event"] in BAD):
            return False
        return last_turn(self._events(stage)) == turn  # else it was tried again while Slurm was asked

    def _in_hand(self, stage: str, events: Sequence[dict[str, Any]], bad: bool) -> bool:
        """Whether anybody is at work on a stage, or will be. Where that cannot be known, a bad ending is the end."""
        if launcher_at_work(self._run):
            return True
        job_id = latest_job(events)
        if job_id is None or not slurm.available():
            return not bad
        try:
            queue = slurm.queue()
        except HpcRlhfError:
            return True  # the controller will be back
        job = queue.get(job_id)
        if job is not None and job.live and job.is_of(stage):
            return True
        sent = [event for event in Ledger(self._run.ledger).events() if event["event"] == "submitted"]
        return bool(
            sentinel.living(queue, [event["token"] for event in sent])
        )  # any of them mends the whole run

    def _events(self, stage: str) -> list[dict[str, Any]]:
        return list(Ledger(self._run.ledger).events(stage))


def latest_job(events: Sequence[dict[str, Any]]) -> str | None:
    """The stage's Slurm job; None when it was not submitted, or was started without Slurm since."""
    job_id = None
    for event in events:
        if event["event"] == "submitted" or (event["event"] == "started" and event.get("job_id") != job_id):
            job_id = event.get("job_id") if event["event"] == "submitted" else None
    return job_id


def launcher_at_work(run: RunDir) -> bool:
    """Whether somebody on any machine holds the run."""
    try:
        return time.time() - run.submit_lock.stat().st_mtime < _LOCK_SILENCE
    except OSError:
        return False
