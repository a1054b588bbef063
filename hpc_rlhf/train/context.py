"""What a stage is given: its spec, its ranks, its files, its safe points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

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
from hpc_rlhf.train.preemption import REASON_OF_CODE, StageStopped, StopFlag
from hpc_rlhf.train.world import World


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
        self.store = CheckpointStore(self.files.checkpoints, self.attempt, keep, self.world)

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

    def reseed(self, step: int) -> None:
        """Make whatever is random in a step a function of the step and the group of ranks."""
        seeds.reseed(self.spec.seed, self.stage, step, self.world.data_rank)

    def resume(self, load: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Load the newest checkpoint, if there is one, and open the metrics at its step."""
        found = self.store.latest()
        if found is not None:
            load(found)
            self.seconds_before = float(found.state.get("seconds", 0.0))
            if self.world.is_main:
                self.ledger.append("resumed", self.stage, attempt=self.attempt, step=found.step)
        step = found.step if found else -1
        self.metrics = MetricsLog(self.files.metrics, self.files.tensorboard, step, self.world.is_main)
        return found

    @property
    def seconds(self) -> float:
        """Time spent on the steps that are kept, over all attempts."""
        return self.seconds_before + time.time() - self.started

    def stop_agreed(self) -> str | None:
        """Why to stop, if any rank was told to. Collective: every rank gets the same answer."""
        return REASON_OF_CODE.get(self.world.max(self.stop.code))

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Save a checkpoint. Collective."""
        began = time.time()
        self.metrics.sync()
        written = self.store.save(step, write, {**state, "seconds": self.seconds})
        if written and self.world.is_main:
            spent = round(time.time() - began, 3)
            self.ledger.append("saved", self.stage, attempt=self.attempt, step=step, seconds=spent)

    def safe_point(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Between steps: save where one is due, and stop where all ranks agree to.

        Raises:
            StageStopped: after saving.
        """
        reason = self.stop_agreed()
        if reason is None:
            if step and step % self.checkpoint_every == 0:
                self.save(step, write, state)
            return
        if self.world.is_main:
            self.ledger.append("stopping", self.stage, attempt=self.attempt, step=step, reason=reason)
        self.save(step, write, state)
        raise StageStopped(reason, step)
