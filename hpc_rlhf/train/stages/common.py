"""Code shared by the stages: preparing models, micro-batches, engines in checkpoints, and the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import fsync_path
from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.data.tokenized import token_lengths
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models import lora
from hpc_rlhf.train.models.export import collect, write
from hpc_rlhf.train.parallel.tensor_parallel import split_model
from hpc_rlhf.train.ragged import plan_step
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled
from hpc_rlhf.train.runtime.world import World

# Held-out samples to evaluate: enough for a standard error of 1.6 % on an accuracy.
EVALUATED = 1024


def prepare_model(model: Any, spec: TrainingSpec, seed: int) -> None:
    """Apply the spec's tensor parallelism, adapters and activation checkpointing to a model, in place."""
    split_model(model, spec.tensor_parallel)
    if spec.lora is not None:
        lora.adapt(model, spec.lora, seed)
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def pair_lengths(rows: Any) -> np.ndarray:
    """Tokens of both sequences of each pair: (pairs,)."""
    return token_lengths(rows, "prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")


class Batches:
    """This rank's micro-batches: as many whole sequences as fit into the token budget of each.

    Args:
        purpose: names the stream of samples, so that two streams differ.
        lengths: (rows,), tokens of each row.
        budget: tokens of a micro-batch.
    """

    def __init__(self, context: StageContext, purpose: str, lengths: np.ndarray, budget: int) -> None:
        self.context = context
        self.purpose = purpose
        self.lengths = lengths
        self.budget = budget

    def indices(self, step: int) -> list[int]:
        """The rows of a step over all ranks, the same for any number of ranks."""
        count, seed, size = len(self.lengths), self.context.spec.seed, self.context.batch.global_
        return [sample_at(p, count, seed, self.purpose) for p in range(step * size, (step + 1) * size)]

    def step(self, data: Any, step: int) -> list[tuple[list[dict[str, Any]], bool]]:
        """This rank's micro-batches of a step, each with True if it is real; see ``plan``."""
        return self._rows(data, self.indices(step))

    def held_out(self, data: Any) -> list[tuple[list[dict[str, Any]], bool]]:
        """This rank's micro-batches of the first EVALUATED samples, each with True if real; see ``plan``."""
        return self._rows(data, list(range(min(len(data), EVALUATED))))

    def _rows(self, data: Any, indices: list[int]) -> list[tuple[list[dict[str, Any]], bool]]:
        return [([data[i] for i in chosen], real) for chosen, real in self.plan(indices)]

    def plan(self, indices: list[int]) -> Iterator[tuple[list[int], bool]]:
        """This rank's micro-batches of some rows, each with True if it is real.

        Every rank gets the same number, because passes are collective under ZeRO-3; a micro-batch that is not
        real only keeps ranks in sync.
        """
        world = self.context.world
        lengths = [int(self.lengths[i]) for i in indices]
        for chosen in plan_step(lengths, world.dims.data, self.budget)[world.data_rank]:
            yield [indices[i] for i in chosen or [0]], bool(chosen)


def save_engines(snapshot: Snapshot, named: dict[str, Any], world: World) -> None:
    """Add the state of DeepSpeed engines to a snapshot. Collective."""
    for name, engine in named.items():
        engines.save(engine, snapshot, name, world)


def load_engines(named: dict[str, Any], world: World) -> Callable[[Checkpoint], None]:
    """A function that loads a checkpoint into the engines."""

    def load(checkpoint: Checkpoint) -> None:
        for name, engine in named.items():
            engines.load(engine, checkpoint.folder / name, world)

    return load


def checked(stop: StopControl, losses: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
    """The losses of an optimizer step, each after a check for a stop, which discards the gradients so far."""

    def after_check(loss: Callable[[], Tensor]) -> Tensor:
        stop.check("micro-batch")
        return loss()

    return [partial(after_check, loss) for loss in losses]


def finish(context: StageContext, step: int, models: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write the artifact that the stage hands on, its manifest last. Collective.

    A stop discards it; the next attempt resumes at the last safe point and writes it again.

    Args:
        models: transformers models by the subfolder they go to.
        metrics: the model's metrics for the manifest.
    """
    folder = new_artifact(context)
    with context.stop.cancellable():
        for subfolder, model in models.items():
            write_model(context, model, folder / subfolder)
    commit(context, folder, step, metrics)


def new_artifact(context: StageContext) -> Path:
    """The folder to write the artifact to; deletes what earlier attempts left of theirs. Collective."""
    target = context.files.model

    def clear() -> None:
        context.checkpoints.store.check_owner()
        for leftover in target.parent.glob(f"{target.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    context.world.on_main(clear)
    return target.with_name(f"{target.name}-{context.attempt}")


def write_model(context: StageContext, model: Any, folder: Path) -> None:
    """Write a transformers model into an artifact, within ``StopControl.cancellable``. Collective.

    Raises:
        WorkCancelled: the attempt must stop.
    """
    state = collect(model, context.world.is_main, lambda: context.stop.check("weights to be written"))
    context.world.on_main(lambda: write(model, state, context.tokenizer, folder, context.stop.should_stop))


def commit(context: StageContext, folder: Path, step: int, metrics: dict[str, Any]) -> None:
    """Turn a written folder into the stage's artifact, atomically. Collective; see ``StopControl.check``."""
    target = context.files.model

    def publish() -> None:
        context.checkpoints.store.check_owner()
        files = _describe(folder, context.stop.should_stop)
        shutil.rmtree(target, ignore_errors=True)
        facts = {
            "stage": context.stage,
            "step": step,
            "seconds": round(context.checkpoints.seconds, 1),
            "metrics": metrics,
        }
        manifest.write(folder, {**facts, "attempt": context.attempt, "ranks": context.world.size}, files)
        folder.rename(target)
        fsync_path(target.parent)

    with context.stop.cancellable():
        context.world.on_main(publish)


def _describe(folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """The manifest's entries for the files. It reads them again: 2 to 4 s for 2 GB.

    Raises:
        WorkCancelled: ``should_stop`` returned True before one of them.
    """
    files: dict[str, Any] = {}
    count = sum(path.is_file() for path in folder.rglob("*"))
    for number in range(count):
        if should_stop():
            raise WorkCancelled
        files |= manifest.describe(folder, (number, count))
    return files
