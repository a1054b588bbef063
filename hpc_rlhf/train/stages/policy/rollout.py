"""What generates the responses of a stage."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.rollout.backend import RolloutBackend
from hpc_rlhf.train.rollout.committed import CommittedRollouts
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import vllm_engine


def rollout_backend(context: StageContext, spec: PolicySpec, model: Any) -> RolloutBackend:
    """The backend that the spec chooses. Collective.

    Args:
        model: the transformers model inside the training engine.
    """
    if spec.rollout.engine == "in_process":
        return RolloutEngine(model, context.world)
    engine = vllm_engine(context, spec.rollout, model)
    return CommittedRollouts(engine, context.files.rollouts, context.checkpoints.store, context.world)
