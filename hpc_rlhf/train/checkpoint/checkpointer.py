"""Saves and resumes an attempt: safe points, when they become checkpoints, and the save at a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hpc_rlhf.run.events import AttemptEvent, Ready, Resumed, Saved, Stopping
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.train.checkpoint.schedule import CheckpointSchedule, Deadline
from hpc_rlhf.train.checkpoint.store import Checkpoint, CheckpointStore, Take
from hpc_rlhf.train.runtime.stop_control import StopControl


@dataclass(frozen=True)
class SafePoint:
    """A place from which a stage can continue, and what to save there."""

    step: int
    take: Take
    state: dict[str, Any]
    part: int = 0
    reached: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written, since when, and for how many seconds it stalled training so far."""

    point: SafePoint
    began: float
    stall: float


@dataclass
class Checkpointer:
    """The saving side of one attempt at a stage.

    Attributes:
        started: when the attempt began, by ``time.monotonic``.
        before_save: called before a save begins. Collective.
        resumed: the step that this attempt resumed from, 0 without a checkpoint.
    """

    store: CheckpointStore
    schedule: CheckpointSchedule
    stop: StopControl
    ledger: Ledger
    stage: str
    started: float
    before_save: Callable[[], None] = lambda: None
    resumed: int = 0

    def __post_init__(self) -> None:
        self.deadline = Deadline()
        self._seconds_before = 0.0
        self._point: SafePoint | None = None  # the last one; before the first there is nothing to save
        self._saving: _Saving | None = None
        self.stop.save = self._save_and_record
        last_save = self.ledger.last(Saved, self.stage)
        if last_save is not None:
            self.schedule.cost, self.deadline.save = last_save.stall, last_save.seconds

    @property
    def seconds(self) -> float:
        """Time spent on the steps that are kept, over all attempts."""
        return self._seconds_before + time.monotonic() - self.started

    def resume(self, load: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Load the newest checkpoint, if there is one. Collective."""
        self.stop.check()
        checkpoint = self.store.latest()
        if checkpoint is not None:
            load(checkpoint)
            self._seconds_before = float(checkpoint.state.get("seconds", 0.0))
            self.resumed = checkpoint.step
            self._record(Resumed(step=checkpoint.step, part=checkpoint.part))
        return checkpoint

    def safe_point(self, step: int, take: Take, state: dict[str, Any], part: int = 0) -> None:
        """Between steps or their parts: save if a checkpoint is due, and stop if any rank has to. Collective.

        Args:
            step: steps done.
            take: puts this rank's share of the state into a snapshot; collective. Until the next safe point
                it may be called at any ``StopControl.check``.
            state: JSON that comes back with the checkpoint.
            part: parts done of the next step.

        Raises:
            StageStopped: after saving.
        """
        first = self._point is None
        point = self._point = SafePoint(step, take, state, part)
        if first:
            self._record(Ready(step=step, part=part))
        due = False
        if self.store.world.is_main:
            if self.deadline.reached_at(part):
                self.stop.flag.expire()
            # By time, no save begins while another is being written; by steps, every rank expects one.
            postpone = self.store.pending and self.schedule.steps is None
            due = self.schedule.due(step, part) and not postpone
        any_due, any_writing = self.stop.check_with([due, not self.store.written])
        if self.store.pending and (any_due or not any_writing):
            self.commit()
        if any_due:
            self._begin(point, copy=True)
        self.deadline.restart_timer()

    def commit(self) -> None:
        """Finish the checkpoint that is being written, if there is one. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        start = time.monotonic()
        self.store.finish()
        end = time.monotonic()
        stall, seconds = saving.stall + end - start, end - saving.began
        self.schedule.saved(stall)
        self.deadline.save = max(self.deadline.save, seconds)
        step, part = saving.point.step, saving.point.part
        self._record(Saved(step=step, part=part, seconds=round(seconds, 3), stall=round(stall, 3)))

    def _begin(self, point: SafePoint, copy: bool) -> None:
        """Begin to save, unless that place is saved already. Collective."""
        began = time.monotonic()
        self.before_save()
        state = {**point.state, "seconds": self.seconds}
        if self.store.begin(point.step, point.take, state, point.part, copy):
            self._saving = _Saving(point, began, time.monotonic() - began)

    def _save_and_record(self, reason: str) -> int:
        """Save the last safe point because the attempt stops; return its step. Collective."""
        point = self._point
        step, part = (point.step, point.part) if point else (self.resumed, 0)
        discarded = round(time.monotonic() - point.reached, 3) if point else 0.0
        self._record(Stopping(step=step, part=part, reason=reason, dropped=discarded))
        self.commit()
        if point:
            self._begin(point, copy=False)
            self.commit()
        return step

    def _record(self, event: AttemptEvent) -> None:
        if self.store.world.is_main:
            self.ledger.append(replace(event, stage=self.stage, attempt=self.store.attempt))
