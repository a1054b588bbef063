"""PPO: the actor learns to give responses with higher rewards without moving far from the SFT model.

Step 3 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155), with the implementation
details of arXiv 2403.17031.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint, Take
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import sample_at, total_steps
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.loading import loading
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import commit, new_artifact, reward_model, start_actor, write_model
from hpc_rlhf.train.stages.held_out import HeldOut
from hpc_rlhf.train.stages.learner import evaluated_rows
from hpc_rlhf.train.stages.ppo.held_out import evaluate
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import ModelSources, PpoModels
from hpc_rlhf.train.stages.ppo.progress import Cursor, Progress
from hpc_rlhf.train.stages.ppo.ptx import pretraining_mixture
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer, Sizes
from hpc_rlhf.train.stages.sample_log import HELD_OUT_PROMPTS, SampleLog


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, PpoSpec)

    # 1. Data, models, and what generates and scores responses.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_ * spec.minibatches, spec.max_steps)
    models = _load_models(context, spec, total)
    budget = context.batch.micro * context.longest
    trainer = PpoTrainer(
        spec, models,
        backend=RolloutEngine(models.policy, world),
        rewards=ModelReward(models.reward, world, budget, partial(context.stop.check, "scores")),
        eos_id=context.tokenizer.eos_token_id,
        sizes=Sizes(budget, context.spec.data.max_answer_tokens, context.loss_factor),
        world=world,
        check=context.stop.check,
    )  # fmt: skip
    mixture = pretraining_mixture(context, spec) if spec.ptx is not None else None

    measure = partial(evaluate, context, trainer, data.held_out)
    held_out = HeldOut(context, models.policy, total, len(data.held_out), measure, models.ema)

    def load(checkpoint: Checkpoint) -> None:
        models.load(checkpoint)
        held_out.load(checkpoint.folder)

    def save(snapshot: Snapshot) -> None:
        models.save(snapshot)
        held_out.save(snapshot)

    # 2. Resume, perhaps between the optimizer steps on an experience.
    checkpoint = context.resume(load)
    first = checkpoint.step if checkpoint else 0
    state: dict[str, Any] = dict(checkpoint.state) if checkpoint else {"trainer": trainer.state}
    trainer.state = state["trainer"]
    progress: Progress | None = None
    if checkpoint and checkpoint.part:
        cursor = Cursor.after(checkpoint.part - 1, spec.minibatches)
        progress = Progress.load(checkpoint.folder, world.rank, cursor, world.device)
    samples = SampleLog(context, checkpoint)
    if held_out.every and checkpoint is None:
        held_out.evaluate(0)

    for step in range(first, total):
        if progress is None:
            # 3. A safe point, then responses to the step's prompts. A stop here or below discards the
            # rollout; the next attempt repeats it.
            context.checkpoints.safe_point(step, save, state)
            held_out.after(step)
            context.reseed(step)
            before = {"kl_coef": trainer.kl_coef, "actor_lr": engines.learning_rate(models.actor)}
            with context.stop.cancellable():
                rollout = _roll_out(context, spec, trainer, data.train, step)

            # 4. Score the responses, and estimate each token's advantage.
            progress = Progress.begin(trainer.evaluate(rollout))
            state = {**state, "trainer": trainer.state, "before": before}

        # 5. The optimizer steps, with the pretraining mixture and the moving average. Before each is a safe
        # point that keeps the experience.
        experience = progress.experience
        key = (context.spec.seed, "minibatches", step)
        stats = trainer.learn(progress, mixture, _save_before_each(context, spec, save, step, state), key)
        progress = None

        # 6. Metrics and samples.
        values = {**summarize(experience, stats, spec, trainer.eos_id, world), **state.pop("before")}
        values.update(engines.traffic([models.actor, models.critic]))
        context.metrics.log(step + 1, total, "train", values)
        if step == 0:
            state.update(reward_first=values["reward"], reward_first_std=values["reward_std"], kl_first=values["kl"])
        state.update(reward_last=values["reward"], kl_last=values["kl"])
        samples.append_rollout(step + 1, experience)
    context.checkpoints.safe_point(total, save, state)

    # 7. Evaluate, compare responses with the SFT model's, and export the models.
    metrics = {name: value for name, value in state.items() if name not in ("seconds", "trainer")}
    if held_out.every:
        metrics |= {name if name == "best_step" else f"held_out_{name}": v for name, v in held_out.finish().items()}
    rows = [data.held_out[i] for i in evaluated_rows(len(data.held_out), context.spec.seed, HELD_OUT_PROMPTS)]
    if rows:
        start = samples.answers(RolloutEngine(models.ref_policy, world), rows, trainer.rewards)
        with held_out.handed_on():
            trainer.backend.sync_weights(models.policy)
            answers = samples.answers(trainer.backend, rows, trainer.rewards)
        samples.append_final(total, rows, answers, start)
    folder = new_artifact(context)
    with held_out.handed_on():
        write_model(context, models.policy, folder)
        if models.ema:
            with models.ema.averaged_weights():  # a stop restores the weights before it saves
                write_model(context, models.policy, folder / context.files.ema_model.name)
    commit(context, folder, total, metrics)


def _load_models(context: StageContext, spec: PpoSpec, total: int) -> PpoModels:
    reward = reward_model(context)
    assert reward is not None, "model_checks refuses such a spec"
    start = ModelSources(
        actor=start_actor(context),
        reward=reward,
        ds_configs=context.ds_configs,
        longest=context.longest,
        updates=total * spec.ppo_epochs * spec.minibatches,
        seed=context.spec.seed,
        loading=partial(loading, context.stop),
    )
    return PpoModels(spec, start, context.tokenizer, context.world)


def _roll_out(context: StageContext, spec: PpoSpec, trainer: PpoTrainer, rows: Any, step: int) -> Rollout:
    """Responses to this rank's prompts of a step: an equal share of each minibatch.

    Raises:
        RolloutCancelled: this rank must stop.
    """
    world, seed, size = context.world, context.spec.seed, context.batch.global_
    share = size // world.dims.data
    first = step * size * spec.minibatches + world.data_rank * share
    places = [first + minibatch * size + i for minibatch in range(spec.minibatches) for i in range(share)]
    prompts = [rows[sample_at(place, len(rows), seed, "ppo")]["prompt_ids"] for place in places]
    keys: list[tuple[object, ...]] = [(seed, "rollout", place) for place in places]
    return trainer.roll_out(prompts, keys, context.stop.should_stop)


def _save_before_each(
    context: StageContext, spec: PpoSpec, take: Take, step: int, state: dict[str, Any]
) -> Callable[[Progress], None]:
    """Before each optimizer step: a safe point, and random numbers of its own."""

    def before(progress: Progress) -> None:
        def save(snapshot: Snapshot) -> None:
            take(snapshot)
            progress.save(snapshot, context.world.rank)

        done = progress.cursor.steps(spec.minibatches)
        context.checkpoints.safe_point(step, save, state, done + 1)
        context.reseed(step, done)

    return before
