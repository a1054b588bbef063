"""Code shared by the stages: the models they start from, and the artifact they hand on."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest, model_card
from hpc_rlhf.run.files import fsync_path
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import agreement, chunked_mlp, lora, pipeline
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.export import collect, named_weights, write
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled


def start_actor(context: StageContext) -> str:
    """Where to load the language model that a stage starts from: the last one that an earlier stage has made, or the
    one that the spec names."""
    for need in context.spec.needs(context.stage):
        if kind_of(need).makes_actor:
            return str(context.run.stage(need).model)
    return context.start_model(context.spec.models.actor)


def reward_model(context: StageContext) -> str | None:
    """Where to load the run's reward model: the stage's that trains it, or a finished one that the spec names."""
    judge = context.spec.judge
    return context.spec.finished_reward if judge is None else str(context.run.stage(judge).model)


def prepare_model(model: Any, spec: TrainingSpec, seed: int) -> None:
    """Apply the spec's tensor parallelism, adapters and recomputation of activations to a model, in place.

    Raises:
        HpcRlhfError: the model does not support one of them.
    """
    if spec.pipeline_stages == 1:  # a pipeline splits the layers of its stage
        split_model(model, spec.tensor_parallel)
    if spec.lora is not None:
        lora.adapt(model, spec.lora, seed)
    if spec.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            what = f"{model.config.model_type} models cannot recompute activations"
            raise HpcRlhfError(what, where="activation_checkpointing", hint="set activation_checkpointing: false")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.chunked_mlp:
        chunked_mlp.enable(model)


def language_engine(
    context: StageContext, model: Any, spec: TrainingSpec, lr: float, total: int, source: str
) -> tuple[Any, Any]:
    """The engine that trains a language model, and what is called like a ``LanguageModel`` for its log-probabilities:
    the engine itself, or the stage of a pipeline. Collective.

    Raises:
        HpcRlhfError: what the model computes here is not what transformers computes.
    """
    if context.world.dims.pipeline > 1:
        return pipeline.training_engine(model, context.dtype, context.ds_config, spec, lr, total, context.world, source)
    engine = engines.training_engine(LanguageModel(model), context.ds_config, spec, lr, total)
    agreement.verify(engine, context.world, source, spec.dropout)
    return engine, engine


def finish(
    context: StageContext, step: int, models: dict[str, Any], metrics: dict[str, Any],
    weights: AbstractContextManager[None] | None = None,
) -> None:  # fmt: skip
    """Write the artifact that the stage hands on, its manifest last. Collective.

    A stop discards it; the next attempt resumes at the last safe point and writes it again.

    Args:
        models: transformers models by the subfolder they go to.
        metrics: the model's metrics for the manifest.
        weights: within it, the models have the weights to hand on; by default, they always do.
    """
    folder = new_artifact(context)
    with weights or nullcontext(), context.stop.cancellable():
        for subfolder, model in models.items():
            write_model(context, model, folder / subfolder)
    commit(context, folder, step, metrics)


def _write_cards(context: StageContext, folder: Path, metrics: dict[str, Any]) -> None:
    """Write the model cards of the chat models in an artifact."""
    spec, run = context.spec, context.run
    earlier = {stage: (manifest.read(run.stage(stage).model) or {}).get("metrics", {}) for stage in spec.trained}
    for model, stage in spec.policies.items():
        if stage == context.stage:
            own = folder if model == stage else folder / run.stage(stage).ema_model.name
            card = model_card.model_card(spec, model, {**earlier, stage: metrics})
            (own / model_card.NAME).write_text(card, encoding="utf-8")


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
    weights = pipeline.of_all_stages(named_weights(model), context.world)
    state = collect(weights, context.world.is_main, lambda: context.stop.check("weights to be written"))
    context.world.on_main(lambda: write(model, state, context.tokenizer, folder, context.stop.should_stop))


def commit(context: StageContext, folder: Path, step: int, metrics: dict[str, Any]) -> None:
    """Turn a written folder into the stage's artifact, with model cards, atomically. Collective; see
    ``StopControl.check``."""
    target = context.files.model

    def publish() -> None:
        context.checkpoints.store.check_owner()
        _write_cards(context, folder, metrics)
        files: dict[str, Any] = {}
        count = sum(path.is_file() for path in folder.rglob("*"))
        for number in range(count):  # reads them again: 2 to 4 s for 2 GB
            if context.stop.should_stop():
                raise WorkCancelled
            files |= manifest.describe(folder, (number, count))
        shutil.rmtree(target, ignore_errors=True)
        facts = {"stage": context.stage, "step": step, "attempt": context.attempt, "ranks": context.world.size}
        seconds = round(context.checkpoints.seconds, 1)
        manifest.write(folder, {**facts, "seconds": seconds, "metrics": metrics}, files)
        folder.rename(target)
        fsync_path(target.parent)

    with context.stop.cancellable():
        context.world.on_main(publish)
