"""What generates the responses of a stage."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.rollout.backend import RolloutBackend
from hpc_rlhf.train.rollout.committed import CommittedRollouts
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine


def rollout_backend(context: StageContext, spec: PolicySpec, model: Any) -> RolloutBackend:
    """The backend that the spec chooses. Collective.

    Args:
        model: the transformers model inside the training engine.
    """
    if spec.rollout.engine == "in_process":
        return RolloutEngine(model, context.world)
    engine = VllmEngine(
        model, context.world, spec.rollout, context.files.engine, context.longest, context.attempt,
        f"stages.{context.stage}.rollout", context.stop.should_stop,
    )  # fmt: skip
    return CommittedRollouts(engine, context.files.rollouts, context.checkpoints.store, context.world)
