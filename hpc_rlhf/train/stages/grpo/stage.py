"""GRPO: the actor learns from how its responses to a prompt compare with each other, without a critic.

Group relative policy optimization (arXiv 2402.03300), and its variants: DAPO (arXiv 2503.14476), Dr. GRPO (arXiv
2503.20783), RLOO (arXiv 2402.14740) and REINFORCE++ (arXiv 2501.03262).
"""

from __future__ import annotations

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.rewards.build import text_rewards
from hpc_rlhf.train.rollout.backend import GenerationRequest
from hpc_rlhf.train.rollout.experience import GroupExperience
from hpc_rlhf.train.stages.grpo.metrics import summarize
from hpc_rlhf.train.stages.grpo.models import GrpoModels
from hpc_rlhf.train.stages.grpo.sampling import Sampler
from hpc_rlhf.train.stages.grpo.trainer import GrpoTrainer
from hpc_rlhf.train.stages.policy import stage as policy
from hpc_rlhf.train.stages.policy.models import model_sources
from hpc_rlhf.train.stages.policy.rewards import stage_rewards


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, GrpoSpec)

    # 1. Data, models, and what generates and scores responses. Rewards that cannot work show it before anything loads.
    texts = text_rewards(context, spec.rewards or ())
    data = context.data()
    prompts = context.batch.global_ * spec.minibatches // spec.group_size
    total = total_steps(len(data.train), spec.epochs, prompts, spec.max_steps)
    start = model_sources(context, spec, total * spec.num_iterations * spec.minibatches)
    models = GrpoModels(spec, start, context.tokenizer, world)
    trainer = GrpoTrainer.of(context, spec, models, stage_rewards(context, spec, texts, models.reward))
    sampler = Sampler(context, spec, trainer, data.train)

    # 2. A step's experience: groups of responses, their scores, and each response's advantage.
    def experience_of(step: int) -> tuple[GroupExperience, policy.Metrics]:
        lr = engines.learning_rate(models.actor)
        rollout, scored = sampler.sample()
        experience = trainer.evaluate_scored(rollout, scored, learned_next=True)
        return experience, {**sampler.metrics, "lr": lr, **trainer.mismatch}

    # 3. Learning from it, perhaps while vLLM responds to the next prompts.
    def request_of(step: int) -> GenerationRequest:
        return trainer.request(*sampler.next_prompts(), context.stop.should_stop, spec.group_size)

    policy.train(context, trainer, data, total, experience_of, request_of, summarize)
