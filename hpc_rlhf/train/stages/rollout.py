"""What generates the responses of a stage."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models.kept import KeptWeights
from hpc_rlhf.train.rollout.backend import RolloutBackend
from hpc_rlhf.train.rollout.committed import CommittedRollouts
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine


def learning_backend(context: StageContext, spec: RolloutSpec, model: Any) -> RolloutBackend:
    """What generates the responses that a stage learns from, and so must repeat when it resumes. Collective.

    Args:
        model: the transformers model inside the training engine.
    """
    if spec.engine == "in_process":
        return RolloutEngine(model, context.world)
    engine = vllm_engine(context, spec, model)
    kept = KeptWeights(model, context.world) if spec.overlap else None
    return CommittedRollouts(engine, context.files.rollouts, context.checkpoints.store, context.world, kept)


def vllm_engine(context: StageContext, spec: RolloutSpec, model: Any) -> VllmEngine:
    """The stage's vLLM, which starts. Collective.

    Args:
        model: the first that it generates with.
    """
    where = f"stages.{context.stage}.rollout"
    return VllmEngine(
        model, context.world, spec, context.files.engine, context.longest, context.attempt, where,
        context.stage_spec.slurm, context.stop.should_stop,
    )  # fmt: skip
