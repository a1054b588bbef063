"""PPO: the actor learns to give responses with higher rewards without moving far from the SFT model.

Step 3 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155), with the implementation
details of arXiv 2403.17031.
"""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.data.sampler import sample_at, total_steps
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.rewards.build import text_rewards
from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.stages.policy import stage as policy
from hpc_rlhf.train.stages.policy.models import model_sources
from hpc_rlhf.train.stages.policy.rewards import score_metrics, stage_rewards
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import PpoModels
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, PpoSpec)

    # 1. Data, models, and what generates and scores responses. Rewards that cannot work show it before anything loads.
    texts = text_rewards(context, spec.rewards or ())
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_ * spec.minibatches, spec.max_steps)
    start = model_sources(context, spec, total * spec.ppo_epochs * spec.minibatches)
    models = PpoModels(spec, start, context.tokenizer, world)
    trainer = PpoTrainer.of(context, spec, models, stage_rewards(context, spec, texts, models.reward))

    # 2. A step's experience: responses, their scores, and each token's advantage.
    def experience_of(step: int) -> tuple[Experience, policy.Metrics]:
        before = {"kl_coef": trainer.kl_coef, "actor_lr": engines.learning_rate(models.actor)}
        rows, keys = _prompts(context, spec, data.train, step)
        with context.stop.cancellable():
            rollout = trainer.roll_out(_ids(rows), keys, context.stop.should_stop)
        scored = trainer.score(rollout, columns_of(rows))
        experience = trainer.evaluate_scored(rollout, scored)
        return experience, {**before, **score_metrics(scored, world), **trainer.mismatch}

    # 3. Learning from it, perhaps while vLLM responds to the prompts of the next step.
    def request_of(step: int) -> GenerationRequest:
        rows, keys = _prompts(context, spec, data.train, step)
        return trainer.request(_ids(rows), keys, context.stop.should_stop)

    policy.train(context, trainer, data, total, experience_of, request_of, summarize)


def _prompts(
    context: StageContext, spec: PpoSpec, rows: Any, step: int
) -> tuple[list[dict[str, Any]], list[tuple[object, ...]]]:
    """This rank's prompts in a step, an equal share of each minibatch, and what seeds their responses."""
    world, seed, size = context.world, context.spec.seed, context.batch.global_
    share = size // world.dims.data
    first = step * size * spec.minibatches + world.data_rank * share
    places = [first + minibatch * size + i for minibatch in range(spec.minibatches) for i in range(share)]
    return [rows[sample_at(place, len(rows), seed, "ppo")] for place in places], [
        (seed, "rollout", place) for place in places
    ]


def _ids(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["prompt_ids"] for row in rows]
