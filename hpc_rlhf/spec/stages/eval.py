"""Evaluation."""

from __future__ import annotations

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import NonNegative, Positive, TopK, TopP
from hpc_rlhf.spec.rewards import Rewards
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.stages.kind import Data, StageKind
from hpc_rlhf.spec.training import StageSpec


class EvalSpec(StageSpec):
    """Evaluation of the models that the other stages make, on the prompts that data.held_out keeps from them.

    micro_batch, zero, offload_params, precision and slurm default to those of the last stage that trains.
    """

    prompts: Positive = 512
    """Maximum number of held-out prompts that every model responds to. The interval of a win rate is about plus or
    minus 100% / sqrt(prompts): 4% at 512."""
    temperature: NonNegative = 1.0
    """Sampling temperature. 1 samples from the models' own distributions, for which the KL is estimated; 0 always takes
    the most likely token. There is no KL then, nor with top_p or top_k: such responses are no samples to estimate it
    from."""
    top_p: TopP = 1.0
    top_k: TopK = 0
    samples: Positive = 1
    """Responses to each prompt, for the accuracy: pass@k and majority@k for powers of two up to this many. Everything
    else is measured on the first response."""
    rollout: RolloutSpec = Field(default=RolloutSpec(), description="What generates the responses.")
    rewards: Rewards | None = None
    """Rewards that decide which responses are right; by default, those of the grpo or ppo stage. See docs/evaluation.md
    for what counts as right."""

    @model_validator(mode="after")
    def _check_samples(self) -> EvalSpec:
        if self.rollout.overlap:
            raise ValueError("rollout.overlap is for ppo and grpo: there is no training for rollouts to overlap with")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0, because all would be the same")
        return self

    @property
    def samples_all(self) -> bool:
        """Whether responses are drawn from the whole distribution."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


EVAL = StageKind(
    name="eval",
    title="Evaluation",
    spec=EvalSpec,
    description="Evaluation of all models on held-out data, after the other stages. {} uses all defaults.",
    data=Data.NONE,
    models=("actor", "reward"),
    makes="report",
    progress=(),
    ranking=("accuracy", "reward", "win_rate", "pair_accuracy", "perplexity"),
    scores=frozenset({"reward", "reward_gain"}),
    result="responses to {prompts} held-out prompts",
    plots=(),
)
