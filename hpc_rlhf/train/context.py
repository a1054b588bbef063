"""One attempt at a stage: its spec, its ranks, its files, its data and models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from hpc_rlhf.run.layout import RunDir, StageDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelRef
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.spec.training import StageSpec, TrainingSpec
from hpc_rlhf.train.checkpoint.checkpointer import Checkpointer
from hpc_rlhf.train.checkpoint.schedule import CheckpointSchedule
from hpc_rlhf.train.checkpoint.store import Checkpoint, CheckpointStore
from hpc_rlhf.train.data import dialogues, sources
from hpc_rlhf.train.data.tokenized import StageData, prepare
from hpc_rlhf.train.metrics import MetricsLog
from hpc_rlhf.train.models.loading import DTYPES, make_from_scratch
from hpc_rlhf.train.models.tokenizers import check_same_tokenizer, load_tokenizer
from hpc_rlhf.train.progress import ProgressLog, say
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.trackers import Trackers


@dataclass
class StageContext:
    """What a stage's code is given.

    Attributes:
        attempt: name of this attempt in the ledger and on checkpoints.
        started: when the attempt began, by ``time.monotonic``.
    """

    spec: JobSpec
    stage: str
    run: RunDir
    world: World
    flag: StopFlag
    attempt: str
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.stage_spec: StageSpec = self.spec.stage(self.stage)
        self.files: StageDir = self.run.stage(self.stage)
        self.batch = derive_batch(self.stage_spec, self.stage)
        self.ds_configs = {model: self._read_ds_config(model) for model in self.stage_spec.strategies}
        schedule, keep = CheckpointSchedule(steps=1), 2  # without training, a checkpoint is small
        if isinstance(self.stage_spec, TrainingSpec):
            schedule, keep = CheckpointSchedule.of(self.stage_spec), self.stage_spec.keep_checkpoints
            training = self.stage_spec
            self.world = self.world.laid_out(
                training.tensor_parallel, training.sequence_parallel, training.pipeline_stages
            )
        store = CheckpointStore(
            self.files.checkpoints, self.attempt, keep, self.world, self.stage_spec.slurm.tasks_per_node
        )
        self.stop = StopControl(self.flag, self.world)
        self.checkpoints = Checkpointer(store, schedule, self.stop, Ledger(self.run.ledger), self.stage, self.started)
        self.trackers: Trackers | None = None

    def _read_ds_config(self, model: str) -> dict[str, Any]:
        path = self.run.ds_config(self.stage, model)
        config: dict[str, Any] = json.loads(path.read_text())
        self.batch.check_ds_config(config, str(path))
        config.pop("train_batch_size", None)  # DeepSpeed multiplies by all ranks, also those that share samples
        return config

    # Batches and types

    @property
    def ds_config(self) -> dict[str, Any]:
        """DeepSpeed's, of the model that the stage trains."""
        return self.ds_configs[""]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stage_spec.precision]

    @property
    def loss_factor(self) -> float:
        """Factor for a loss that is divided by the global token count: DeepSpeed divides gradients by the number of
        ranks and losses by the number of micro-batches."""
        return float(self.batch.ranks * self.batch.accumulation)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.spec.longest(self.stage)

    # Inputs

    @cached_property
    def tokenizer(self) -> Any:
        models, own = self.spec.models, self.files.path / "tokenizer"
        tokenizer = load_tokenizer(models.actor, sources.texts(self.spec), own, self.world)
        judge = self.spec.judge
        will_load_reward = self.spec.uses_reward_model and not (judge and self.run.stage(judge).model.exists())
        if isinstance(models.reward, str) and models.reward != models.actor and will_load_reward:
            actor = models.actor if isinstance(models.actor, str) else str(own)
            check_same_tokenizer(tokenizer, actor, models.reward)

        if kind_of(self.stage).data is Data.DOCUMENTS:  # they end with the tokenizer's own EOS
            return tokenizer

        def thinks() -> bool:
            return self.world.on_main(lambda: sources.thinks(self.spec))

        return dialogues.configure_tokenizer(tokenizer, self.spec.data.template, thinks)

    def data(self) -> StageData:
        with self.stop.cancellable():
            return prepare(self.spec, self.stage, self.tokenizer, self.files.data, self.world, self.stop.should_stop)

    def start_model(self, ref: ModelRef) -> str:
        """Where to load a model that the spec names; one that it defines from scratch is first created."""
        if not isinstance(ref, FromScratch):
            return ref
        folder = self.files.path / "initial"
        make_from_scratch(ref, self.tokenizer, self.spec.seed, folder, self.world)
        return str(folder)

    # Steps

    def reseed(self, step: int, *part: int) -> None:
        """Make all randomness in a step, or in a part of it, a function of that and this rank's share of tokens."""
        seeds.reseed(self.spec.seed, self.stage, step, self.world.replica_rank, *part)

    def resume(self, load: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Load the newest checkpoint, if there is one, and open the metrics at its step. Collective."""
        checkpoint = self.checkpoints.resume(load)
        step = checkpoint.step if checkpoint else -1
        part = checkpoint.part if checkpoint else 0
        progress = ProgressLog(self.stage)
        self.metrics = MetricsLog(self.files.metrics, self.files.tensorboard, step, self.world.is_main, part, progress)
        self.checkpoints.before_save = self.metrics.sync
        if self.world.is_main:
            say(self.stage, "loaded; starts" if checkpoint is None else f"loaded; resumes from step {step}")
            self.trackers = Trackers(self.spec, self.run, self.stage)
        return checkpoint

    def close(self, quick: bool = False) -> None:
        """Let the trackers finish."""
        if self.trackers is not None:
            self.trackers.close(quick)
