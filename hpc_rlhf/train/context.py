"""What a stage is given: its spec, its ranks, its files, its safe points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir, StageDir
from hpc_rlhf.spec.model import FromScratch, JobSpec, ModelRef
from hpc_rlhf.spec.training import StageSpec, TrainingSpec
from hpc_rlhf.train import seeds
from hpc_rlhf.train.checkpoint import Checkpoint, CheckpointStore
from hpc_rlhf.train.data import dialogues, sources
from hpc_rlhf.train.data.tokenized import StageData, prepare
from hpc_rlhf.train.metrics import MetricsLog
from hpc_rlhf.train.models.load import DTYPES, folder_or_id, make_from_scratch
from hpc_rlhf.train.models.tokenizers import load_tokenizer
from hpc_rlhf.train.polls import Polls
from hpc_rlhf.train.preemption import REASON_OF_CODE, StageStopped, StopFlag
from hpc_rlhf.train.world import World

# Writes this rank's share of a checkpoint into a folder. Collective.
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Point:
    """A place from which a stage can go on: what is to be saved there."""

    step: int
    write: Write
    state: dict[str, Any]
    part: int = 0


@dataclass
class StageContext:
    """One attempt at one stage.

    Attributes:
        attempt: names this attempt in the ledger and on checkpoints.
        started: seconds since the epoch at which the attempt began.
        seconds_before: seconds that earlier attempts spent on the steps kept.
    """

    spec: JobSpec
    stage: str
    run: RunDir
    world: World
    stop: StopFlag
    attempt: str
    started: float = field(default_factory=time.time)
    seconds_before: float = 0.0

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.run.ledger)
        self.stage_spec: StageSpec = self.spec.stage(self.stage)
        self.files: StageDir = self.run.stage(self.stage)
        self.ds_configs: dict[str, dict[str, Any]] = {
            model: json.loads(self.run.ds_config(self.stage, model).read_text())
            for model in self.stage_spec.strategies
        }
        self.checkpoint_every, keep = 1, 2  # where nothing is trained, a checkpoint is small
        if isinstance(self.stage_spec, TrainingSpec):
            self.checkpoint_every, keep = self.stage_spec.checkpoint_every, self.stage_spec.keep_checkpoints
            self.world = self.world.grouped(self.stage_spec.tensor_parallel)
        self.store = CheckpointStore(self.files.checkpoints, self.attempt, keep, self.world)
        self.polls = Polls(self.world)
        self.point: Point | None = None  # the last safe point; before the first there is nothing to save

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
        return prepare(self.spec, self.stage, self.tokenizer, self.files.data, self.world)

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
        found = self.store.latest()
        if found is not None:
            load(found)
            self.seconds_before = float(found.state.get("seconds", 0.0))
            if self.world.is_main:
                self.ledger.append("resumed", self.stage, attempt=self.attempt, **_place(found))
        step = found.step if found else -1
        self.metrics = MetricsLog(self.files.metrics, self.files.tensorboard, step, self.world.is_main)
        return found

    @property
    def seconds(self) -> float:
        """Time spent on the steps that are kept, over all attempts."""
        return self.seconds_before + time.time() - self.started

    def safe_point(self, step: int, write: Write, state: dict[str, Any], part: int = 0) -> None:
        """Between steps, or parts of a step: save where it is due, and stop where all ranks agree to. Collective.

        Args:
            step: steps done.
            write: writes this rank's share of what is to be saved; collective. It may be called until the next safe
                point, if by then only ``pause`` and what can be dropped came.
            state: JSON that comes back with the checkpoint.
            part: parts done of the step after those.

        Raises:
            StageStopped: after saving.
        """
        self.point = Point(step, write, state, part)
        (code,) = self.polls.now([self.stop.code])
        if code:
            self._stop(code)
        if step and not part and step % self.checkpoint_every == 0:
            self._save(self.point)

    def pause(self, kind: str) -> None:
        """Between pieces of work that can be dropped: stop where all ranks agree to. Collective.

        What is then saved is the last safe point, so weights and optimizers must be as they were there.

        Args:
            kind: of the work, whose pieces take about the same time each.

        Raises:
            StageStopped: after saving, if there is anything to save.
        """
        said = self.polls.between(kind, [self.stop.code])
        if said and said[0]:
            self._stop(said[0])

    def pausing(self, losses: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
        """The losses of an optimizer step, with a pause before each: a stop drops the gradients of those before."""

        def paused(loss: Callable[[], Tensor]) -> Tensor:
            self.pause("micro-batch")
            return loss()

        return [partial(paused, loss) for loss in losses]

    def stop_if_told(self) -> None:
        """Stop where any rank was told to, at once. Collective; see ``pause``."""
        (code,) = self.polls.now([self.stop.code])
        if code:
            self._stop(code)

    def _stop(self, code: int) -> NoReturn:
        reason, point = REASON_OF_CODE[code], self.point
        if self.world.is_main:
            place = _place(point) if point else {"step": 0}
            self.ledger.append("stopping", self.stage, attempt=self.attempt, **place, reason=reason)
        if point:
            self._save(point)
        raise StageStopped(reason, point.step if point else 0)

    def _save(self, point: Point) -> None:
        began = time.time()
        self.metrics.sync()
        state = {**point.state, "seconds": self.seconds}
        written = self.store.save(point.step, point.write, state, point.part)
        if written and self.world.is_main:
            spent = round(time.time() - began, 3)
            self.ledger.append("saved", self.stage, attempt=self.attempt, **_place(point), seconds=spent)


def _place(point: Point | Checkpoint) -> dict[str, int]:
    """Where it is, as the ledger says it."""
    return {"step": point.step, **({"part": point.part} if point.part else {})}
