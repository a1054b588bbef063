"""What the stages share: adapters, evaluation batches, engines in checkpoints, and the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc_rlhf import manifest
from hpc_rlhf.spec.stages import StageSpec
from hpc_rlhf.train.checkpoint import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import lora
from hpc_rlhf.train.models.weights import export

# Held-out samples looked at: enough for a standard error of 1.6 % on an accuracy.
EVALUATED = 1024


def adapted(model: Any, spec: StageSpec, seed: int) -> None:
    """Prepare a model for training as the spec says: adapters, activation checkpointing."""
    if spec.lora is not None:
        lora.adapt(model, spec.lora, seed)
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def evaluation_batches(held_out: Any, context: StageContext) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """This rank's micro-batches of the held-out samples, and whether they are real.

    Every rank gets the same number, because a forward pass is collective under ZeRO-3; those that are not
    real only keep step.
    """
    count = min(len(held_out), EVALUATED)
    starts = range(0, count, context.micro)
    size, rank = context.world.size, context.world.rank
    for turn in range(0, len(starts), size):
        mine = turn + rank
        start = starts[mine if mine < len(starts) else 0]
        rows = [held_out[i] for i in range(start, min(start + context.micro, count))]
        yield rows, mine < len(starts)


def save_engines(folder: Path, named: dict[str, Any]) -> None:
    """Every rank writes its part of each DeepSpeed engine's state."""
    for name, engine in named.items():
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)


def load_engines(named: dict[str, Any]) -> Callable[[Checkpoint], None]:
    """A function that puts a checkpoint's state into the engines."""

    def load(found: Checkpoint) -> None:
        for name, engine in named.items():
            path, _ = engine.load_checkpoint(str(found.folder), tag=name)
            assert path is not None, f"DeepSpeed found no {name} in {found.folder}"

    return load


def finish(context: StageContext, step: int, models: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write the artifact that is handed on; its manifest last. Collective.

    Args:
        models: transformers models by the subfolder they go to.
        metrics: what the manifest says of the model.
    """
    target = context.files.model
    partial = target.with_name(f"model-{context.attempt}")
    if context.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    for subfolder, model in models.items():
        export(model, context.tokenizer, partial / subfolder, context.world.is_main)
    commit(context, partial, step, metrics)


def commit(context: StageContext, partial: Path, step: int, metrics: dict[str, Any]) -> None:
    """Turn a written folder into the stage's artifact, in one step. Collective."""
    target = context.files.model

    def publish() -> None:
        context.store.check_owner()
        shutil.rmtree(target, ignore_errors=True)
        facts = {
            "stage": context.stage,
            "step": step,
            "seconds": round(context.seconds, 1),
            "metrics": metrics,
        }
        manifest.write(partial, {**facts, "attempt": context.attempt, "ranks": context.world.size})
        partial.rename(target)
        manifest.fsync_path(target.parent)

    context.world.on_main(publish)
