"""Evaluation."""

from __future__ import annotations

from pydantic import Field

from hpc_rlhf.spec.fields import NonNegative, Positive
from hpc_rlhf.spec.stages.kind import Data, StageKind
from hpc_rlhf.spec.stages.sampling import TopK, TopP
from hpc_rlhf.spec.training import StageSpec


class EvalSpec(StageSpec):
    """Evaluation of the models that the other stages make, on what data.held_out keeps from them.

    Left out, micro_batch, zero, offload_params, precision and slurm are those of the last stage that trains.
    """

    prompts: Positive = Field(
        default=512,
        description="Held-out prompts that every model answers, at most. The interval of a win rate is about plus or minus 100 % / sqrt(prompts) wide: 4 % at 512.",
    )
    temperature: NonNegative = Field(
        default=1.0,
        description="Sampling temperature of the answers. 1 shows the models as they are, which the KL is an estimate of; 0 takes the likeliest token each time, and there is no KL then.",
    )
    top_p: TopP = 1.0
    top_k: TopK = 0


EVAL = StageKind(
    name="eval",
    title="Evaluation",
    spec=EvalSpec,
    description="Evaluation of all models on held-out data, once the other stages are done. {} takes all defaults.",
    data=Data.NONE,
    models=("actor", "reward"),
    makes="report",
    progress=("perplexity", "accuracy"),
    ranking=("reward", "win_rate", "pair_accuracy", "perplexity"),
    scores=frozenset({"reward", "reward_gain"}),
    result="{prompts} held-out prompts answered",
    plots=(),
)
