"""The training loop that PPO and GRPO share; each makes its experience in its own way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint, Take
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.tokenized import StageData
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.progress import say
from hpc_rlhf.train.rewards.blend import Blend
from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.committed import ROLLOUT, CommittedRollouts
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import commit, new_artifact, write_model
from hpc_rlhf.train.stages.held_out import HeldOut
from hpc_rlhf.train.stages.learner import evaluated_rows
from hpc_rlhf.train.stages.policy.held_out import evaluate
from hpc_rlhf.train.stages.policy.progress import E, Progress
from hpc_rlhf.train.stages.policy.ptx import pretraining_mixture
from hpc_rlhf.train.stages.policy.trainer import PolicyTrainer
from hpc_rlhf.train.stages.sample_log import HELD_OUT_PROMPTS, SampleLog

# KL of the actor from what drew its responses, in nats per token, above which there is a warning.
MISMATCH = 0.02

Metrics = dict[str, float | None]
# A step's metrics from its experience, ``Progress.sums``, the spec, the end-of-sequence token and the world.
Summarize = Callable[[E, dict[str, float], Any, int, World], Metrics]
# Entries of a checkpoint's state that are not metrics of the finished stage.
_INTERNAL = ("seconds", "trainer", "start_answers")
# Where a checkpoint has the weights that the next rollout is drawn with.
_KEPT = "sampler"


def train(
    context: StageContext, trainer: PolicyTrainer[E], data: StageData, total: int,
    experience_of: Callable[[int], tuple[E, Metrics]], request_of: Callable[[int], GenerationRequest],
    summarize: Summarize[E],
) -> None:  # fmt: skip
    """Train, evaluate and export the actor.

    Args:
        total: steps of the stage.
        experience_of: makes a step's experience, and the metrics known before anything learns from it. A stop may
            discard it; the next attempt repeats it. Collective.
        request_of: what the next step's experience asks the backend for first.
        summarize: see ``Summarize``. Collective.
    """
    spec, world, models = trainer.spec, context.world, trainer.models
    mixture = pretraining_mixture(context, spec) if spec.ptx is not None else None
    committing = [each for each in (trainer.rewards, trainer.backend) if isinstance(each, (Blend, CommittedRollouts))]
    measure = partial(evaluate, context, trainer, data.held_out)
    ahead = trainer.backend if isinstance(trainer.backend, CommittedRollouts) and trainer.backend.kept else None
    held_out = HeldOut(context, models.policy, total, len(data.held_out), measure, models.ema)

    def begin(step: int, purpose: str) -> None:
        for each in committing:
            each.begin(step, purpose)

    def load(checkpoint: Checkpoint) -> None:
        models.load(checkpoint)
        held_out.load(checkpoint.folder)
        if ahead and ahead.kept:
            ahead.kept.load(checkpoint.folder / _KEPT)

    def save(snapshot: Snapshot) -> None:
        models.save(snapshot)
        held_out.save(snapshot)
        if ahead and ahead.kept:
            ahead.kept.save(snapshot, _KEPT)

    # 1. Resume, perhaps between the optimizer steps on an experience.
    checkpoint = context.resume(load)
    first = checkpoint.step if checkpoint else 0
    state: dict[str, Any] = dict(checkpoint.state) if checkpoint else {"trainer": trainer.state}
    trainer.state = state["trainer"]
    progress: Progress[E] | None = None
    if checkpoint and checkpoint.part:
        progress = trainer.saved_progress(checkpoint.folder, checkpoint.part - 1)
    samples = SampleLog(context, checkpoint)
    rows = [data.held_out[i] for i in evaluated_rows(len(data.held_out), context.spec.seed, HELD_OUT_PROMPTS)]
    if checkpoint is None:
        with models.at_start() as start:
            if start is None and rows:  # the last chance to sample from the model before training
                trainer.backend.sync_weights(models.policy)
                begin(0, "start")
                state["start_answers"] = samples.answers(trainer.backend, rows, trainer.rewards)
        if held_out.every:
            begin(0, "held-out")
            held_out.evaluate(0)

    for step in range(first, total):
        if progress is None:
            # 2. A safe point, then responses to the step's prompts, their scores, and each token's advantage. A stop
            # here or below discards the rollout; the next attempt repeats it.
            context.checkpoints.safe_point(step, save, state)
            begin(step, "held-out")
            held_out.after(step)
            context.reseed(step)
            begin(step, ROLLOUT)
            experience, before = experience_of(step)
            if (before.get("sampler_kl") or 0.0) > MISMATCH and world.is_main:
                say(context.stage, f"warning: sampler_kl is {before['sampler_kl']:.3g}; see docs/rollouts.md")
            progress = trainer.begin(experience)
            state = {**state, "trainer": trainer.state, "before": before}

        # 3. The optimizer steps, with the pretraining mixture and the moving average. Before each is a safe
        # point that keeps the experience. One-step-off, the next rollout starts before the first.
        experience = progress.experience
        key = (context.spec.seed, "minibatches", step)
        before_each: Callable[[Progress[E]], None] = _save_before_each(context, save, step, state)
        if ahead and step + 1 < total:
            before_each = _starting(context, trainer, ahead, step, request_of, before_each)
        stats = trainer.learn(progress, mixture, before_each, key)
        progress = None

        # 4. Metrics and samples.
        values = {**summarize(experience, stats, spec, trainer.eos_id, world), **state.pop("before")}
        values.update(engines.traffic(list(models.trained.values())))
        context.metrics.log(step + 1, total, "train", values)
        if step == 0:
            if values["reward"] is None and world.is_main:
                what = "no reward applied to any response of the first step, so it learned nothing"
                print(f"hpc-rlhf: warning: stage {context.stage}: {what}", file=sys.stderr, flush=True)
            state.update(reward_first=values["reward"], reward_first_std=values["reward_std"], kl_first=values["kl"])
        state.update(reward_last=values["reward"], kl_last=values["kl"])
        samples.append_rollout(step + 1, experience)
    context.checkpoints.safe_point(total, save, state)

    # 5. Evaluate, compare responses with those of the model before training, and export the models.
    metrics = {name: value for name, value in state.items() if name not in _INTERNAL}
    begin(total, "held-out")
    if held_out.every:
        metrics |= {name if name == "best_step" else f"held_out_{name}": v for name, v in held_out.finish().items()}
    if rows:
        begin(total, "final")
        with models.at_start() as start:
            before_training = (
                state["start_answers"]
                if start is None
                else samples.answers(RolloutEngine(start, world), rows, trainer.rewards)
            )
        with held_out.handed_on():
            trainer.backend.sync_weights(models.policy)
            answers = samples.answers(trainer.backend, rows, trainer.rewards)
        samples.append_final(total, rows, answers, before_training)
    folder = new_artifact(context)
    with held_out.handed_on():
        write_model(context, models.policy, folder)
        if models.ema:
            with models.ema.averaged_weights():  # a stop restores the weights before it saves
                write_model(context, models.policy, folder / context.files.ema_model.name)
    commit(context, folder, total, metrics)


def _save_before_each(
    context: StageContext, take: Take, step: int, state: dict[str, Any]
) -> Callable[[Progress[E]], None]:
    """Before each optimizer step: a safe point, and random numbers of its own."""

    def before(progress: Progress[E]) -> None:
        def save(snapshot: Snapshot) -> None:
            take(snapshot)
            progress.save(snapshot, context.world.rank)

        context.checkpoints.safe_point(step, save, state, progress.done + 1)
        context.reseed(step, progress.done)

    return before


def _starting(
    context: StageContext, trainer: PolicyTrainer[E], ahead: CommittedRollouts, step: int,
    request_of: Callable[[int], GenerationRequest], save: Callable[[Progress[E]], None],
) -> Callable[[Progress[E]], None]:  # fmt: skip
    """Before the first optimizer step that this attempt makes in a step, the next step's rollout starts: after a safe
    point, which has the weights that it is drawn with.

    Args:
        save: called before each optimizer step, with a safe point.
    """
    started = False

    def before(progress: Progress[E]) -> None:
        nonlocal started
        if not progress.done:
            ahead.keep(step)
        save(progress)
        if not started:
            started = True
            with context.stop.cancellable():
                ahead.sync_weights(trainer.models.policy)
                ahead.start(step + 1, request_of(step + 1), learned=bool(progress.done))

    return before
