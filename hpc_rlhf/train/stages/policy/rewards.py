"""What scores a stage's responses, and metrics of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rewards.build import build_rewards
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rewards.text import TextReward
from hpc_rlhf.train.runtime.world import World


def stage_rewards(
    context: StageContext, spec: PolicySpec, texts: Sequence[TextReward | None], engine: Any
) -> RewardSource:
    """The rewards that the spec lists; without any, the run's reward model.

    Args:
        texts: see ``text_rewards``.
        engine: the run's reward model; None if the stage does not use it.
    """
    budget, trained = context.batch.micro * context.longest, None
    if engine is not None:
        trained = ModelReward(engine, context.world, budget, partial(context.stop.check, "scores"))
    if spec.rewards is not None:
        return build_rewards(context, spec.rewards, texts, trained)
    assert trained is not None, "model_checks refuses such a spec"
    return trained


def score_metrics(scored: Scores, world: World) -> dict[str, float | None]:
    """The mean of each reward over the responses to which it applies, and the number of responses for which one failed.
    Nothing if the spec lists no rewards. Collective."""
    if not scored.parts:
        return {}
    known = {name: [score for score in scores if score is not None] for name, scores in scored.parts.items()}
    own = {f"sum/{name}": sum(scores) for name, scores in known.items()}
    own |= {f"count/{name}": float(len(scores)) for name, scores in known.items()}
    total = world.sums({**own, "failed": float(sum(scored.failed))})
    means = {
        f"reward/{name}": total[f"sum/{name}"] / total[f"count/{name}"] if total[f"count/{name}"] else None
        for name in known
    }
    return {**means, "rewards_failed": total["failed"]}
