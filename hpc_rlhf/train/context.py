"""What a stage is given: its spec, its ranks, its files, its safe points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hpc_rlhf.run.layout import RunDir, StageDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelRef
from hpc_rlhf.spec.training import StageSpec, TrainingSpec
from hpc_rlhf.train.checkpoint.schedule import Cadence, Deadline
from hpc_rlhf.train.checkpoint.store import Checkpoint, CheckpointStore, Take
from hpc_rlhf.train.data import dialogues, sources
from hpc_rlhf.train.data.tokenized import StageData, prepare
from hpc_rlhf.train.metrics import MetricsLog
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.interruptible_loading import asking
from hpc_rlhf.train.models.loading import DTYPES, folder_or_id, make_from_scratch
from hpc_rlhf.train.models.tokenizers import load_tokenizer
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.consensus import Polls
from hpc_rlhf.train.runtime.stop_signals import (
    REASON_OF_CODE,
    TIME_LIMIT,
    Interrupted,
    StageStopped,
    StopFlag,
)
from hpc_rlhf.train.runtime.watchdog import Pulse
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.trackers import Trackers


@dataclass(frozen=True)
class Point:
    """A place from which a stage can go on: what is to be saved there."""

    step: int
    take: Take
    state: dict[str, Any]
    part: int = 0


@dataclass
class _Saving:
    """A checkpoint that is being written.

    Attributes:
        began: when it was begun.
        stall: seconds that training stood still for it so far.
    """

    point: Point
    began: float
    stall: float


@dataclass
class StageContext:
    """One attempt at one stage.

    Attributes:
        attempt: names this attempt in the ledger and on checkpoints.
        started: by ``time.monotonic``, when the attempt began.
        seconds_before: seconds that earlier attempts spent on the steps kept.
    """

    spec: JobSpec
    stage: str
    run: RunDir
    world: World
    stop: StopFlag
    attempt: str
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.run.ledger)
        self.stage_spec: StageSpec = self.spec.stage(self.stage)
        self.files: StageDir = self.run.stage(self.stage)
        self.ds_configs: dict[str, dict[str, Any]] = {
            model: json.loads(self.run.ds_config(self.stage, model).read_text())
            for model in self.stage_spec.strategies
        }
        self.cadence, keep = Cadence(steps=1), 2  # where nothing is trained, a checkpoint is small
        if isinstance(self.stage_spec, TrainingSpec):
            self.cadence, keep = Cadence.of(self.stage_spec), self.stage_spec.keep_checkpoints
            self.world = self.world.grouped(self.stage_spec.tensor_parallel)
        self.store = CheckpointStore(
            self.files.checkpoints, self.attempt, keep, self.world, self.stage_spec.slurm.tasks_per_node
        )
        self.deadline = Deadline()
        self.polls = Polls(self.world)
        self.point: Point | None = None  # the last safe point; before the first there is nothing to save
        self._point_at = 0.0
        self.resumed = 0
        self.pulse = Pulse()
        self.trackers: Trackers | None = None
        self._saving: _Saving | None = None
        before = self.ledger.last("saved", self.stage) or {}
        self.cadence.cost = float(before.get("stall", self.cadence.cost))
        self.deadline.save = float(before.get("seconds", 0.0))

    # Batches and types

    @property
    def ds_config(self) -> dict[str, Any]:
        """DeepSpeed's, of the model that the stage trains."""
        return self.ds_configs[""]

    @property
    def micro(self) -> int:
        """Samples of a micro-batch."""
        return int(self.ds_config["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step on each rank."""
        return int(self.ds_config["gradient_accumulation_steps"])

    @property
    def per_step(self) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.micro * self.accumulation * self.world.data_size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stage_spec.precision]

    @property
    def loss_scale(self) -> float:
        """What a loss that is divided by the global token count is multiplied with, because DeepSpeed
        divides gradients by the number of ranks and losses by the number of micro-batches."""
        return float(self.world.data_size * self.accumulation)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.spec.data.max_prompt_tokens + self.spec.data.max_answer_tokens

    # Inputs

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(
            self.spec.models.actor, sources.texts(self.spec), self.files.path / "tokenizer", self.world
        )
        return dialogues.follow(tokenizer, self.spec.data.template)

    def data(self) -> StageData:
        with self.dropped():
            return prepare(self.spec, self.stage, self.tokenizer, self.files.data, self.world, self.told)

    @contextmanager
    def loading(self, ds_config: dict[str, Any]) -> Iterator[None]:
        """Around the loading of a model, in shards if DeepSpeed is configured so. Collective; see ``pause``.

        A load that fails where there is to be a stop counts as dropped: what it needs may be going down with the node.

        Two things are not dropped, and if they are cut off, nothing trained is lost. ZeRO-3 loads on all ranks together:
        13B in bf16 take 13 to 26 s at 1 to 2 GB/s, and it stops before the next model. A download from a hub may
        take minutes; files that have come are there for the next attempt.
        """
        self.stop_if_told()
        together = ds_config["zero_optimization"]["stage"] == 3
        try:
            with engines.sharded_loading(ds_config), asking(bool if together else self._is_told):
                yield
        except Exception:
            if not self._is_told():
                raise
        self.stop_if_told()

    def start_model(self, ref: ModelRef) -> str:
        """Where the model that the spec names loads from; made first, if it is to be made."""
        made = self.files.path / "initial"
        if isinstance(ref, FromScratch):
            make_from_scratch(ref, self.tokenizer, self.spec.seed, made, self.world)
        return folder_or_id(ref, made)

    # Steps

    def reseed(self, step: int, *part: int) -> None:
        """Make whatever is random in a step, or in a part of it, a function of that and the group of ranks."""
        seeds.reseed(self.spec.seed, self.stage, step, self.world.data_rank, *part)

    def resume(self, load: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Load the newest checkpoint, if there is one, and open the metrics at its step."""
        self.stop_if_told()
        found = self.store.latest()
        if found is not None:
            load(found)
            self.seconds_before = float(found.state.get("seconds", 0.0))
            self.resumed = found.step
            if self.world.is_main:
                self.ledger.append("resumed", self.stage, attempt=self.attempt, **_place(found))
        step = found.step if found else -1
        self.metrics = MetricsLog(self.files.metrics, self.files.tensorboard, step, self.world.is_main)
        if self.world.is_main:
            self.trackers = Trackers(self.spec, self.run, self.stage)
        return found

    @property
    def seconds(self) -> float:
        """Time spent on the steps that are kept, over all attempts."""
        return self.seconds_before + time.monotonic() - self.started

    def safe_point(self, step: int, take: Take, state: dict[str, Any], part: int = 0) -> None:
        """Between steps, or parts of a step: save where it is due, and stop where all ranks agree to. Collective.

        Args:
            step: steps done.
            take: puts this rank's share of what is to be saved into a snapshot; collective. It may be called until
                the next safe point, if by then only ``pause`` and what can be dropped came.
            state: JSON that comes back with the checkpoint.
            part: parts done of the step after those.

        Raises:
            StageStopped: after saving.
        """
        first = self.point is None
        self.point = Point(step, take, state, part)
        self._point_at = time.monotonic()
        self.pulse.beat()
        if first and self.world.is_main:
            self.ledger.append("ready", self.stage, attempt=self.attempt, **_place(self.point))
        code, due = self.stop.code, 0
        if self.world.is_main:
            code = max(code, TIME_LIMIT * self.deadline.at(part))
            waits = self.store.pending and self.cadence.steps is None
            due = int(self.cadence.due(step, part) and not waits)
        code, due, writing = self.polls.now([code, due, not self.store.written])
        if code:
            self._stop(code)
        if self.store.pending and (due or not writing):
            self.commit()
        if due:
            self._begin(self.point, apart=True)
        self.deadline.went_on()

    def pause(self, kind: str) -> None:
        """Between pieces of work that can be dropped: stop where all ranks agree to. Collective.

        What is then saved is the last safe point, so weights and optimizers must be as they were there.

        Args:
            kind: of the work, whose pieces take about the same time each.

        Raises:
            StageStopped: after saving, if there is anything to save.
        """
        self.pulse.beat()
        said = self.polls.between(kind, [self.stop.code])
        if said and said[0]:
            self._stop(said[0])

    def drop_if_told(self, kind: str) -> None:
        """Between pieces of work within ``dropped``: drop it where all ranks agree to stop. Collective; see ``pause``.

        Raises:
            Interrupted: they do.
        """
        self.pulse.beat()
        said = self.polls.between(kind, [self.stop.code])
        if said and said[0]:
            raise Interrupted

    def pausing(self, losses: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
        """The losses of an optimizer step, with a pause before each: a stop drops the gradients of those before."""

        def paused(loss: Callable[[], Tensor]) -> Tensor:
            self.pause("micro-batch")
            return loss()

        return [partial(paused, loss) for loss in losses]

    def told(self) -> bool:
        """Whether this rank knows of a stop. The others learn of it within a second, wherever they are."""
        self.pulse.beat()
        return self._is_told()

    def _is_told(self) -> bool:
        return self.stop.code > 0

    def stop_if_told(self) -> None:
        """Stop where any rank was told to, at once. Collective; see ``pause``."""
        (code,) = self.polls.now([self.stop.code])
        if code:
            self._stop(code)

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Around work that is dropped by ``Interrupted`` where there is to be a stop. Collective; see ``pause``."""
        with suppress(Interrupted):
            yield
        self.stop_if_told()

    def _stop(self, code: int) -> NoReturn:
        reason, point = REASON_OF_CODE[code], self.point
        if self.world.is_main:
            place = _place(point) if point else {"step": self.resumed}
            dropped = round(time.monotonic() - self._point_at, 3) if point else 0.0
            facts = {**place, "reason": reason, "dropped": dropped}
            self.ledger.append("stopping", self.stage, attempt=self.attempt, **facts)
        self.commit()
        if point:
            self._begin(point, apart=False)
            self.commit()
        raise StageStopped(reason, point.step if point else self.resumed)

    def _begin(self, point: Point, apart: bool) -> None:
        """Begin to save, if that place is not saved yet. Collective."""
        began = time.monotonic()
        self.metrics.sync()
        state = {**point.state, "seconds": self.seconds}
        if self.store.begin(point.step, point.take, state, point.part, apart):
            self._saving = _Saving(point, began, time.monotonic() - began)

    def commit(self) -> None:
        """Bring to its end what is being saved, if anything is. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        before = time.monotonic()
        self.store.finish()
        now = time.monotonic()
        stall, spent = saving.stall + now - before, now - saving.began
        self.cadence.saved(stall)
        self.deadline.save = max(self.deadline.save, spent)
        if self.world.is_main:
            facts = {**_place(saving.point), "seconds": round(spent, 3), "stall": round(stall, 3)}
            self.ledger.append("saved", self.stage, attempt=self.attempt, **facts)

    def close(self, hurry: bool = False) -> None:
        """Let the trackers come to their end."""
        if self.trackers is not None:
            self.trackers.close(hurry)


def _place(point: Point | Checkpoint) -> dict[str, int]:
    """Where it is, as the ledger says it."""
    return {"step": point.step, **({"part": point.part} if point.part else {})}
