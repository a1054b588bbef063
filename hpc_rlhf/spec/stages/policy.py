"""What PPO and GRPO have in common: responses are sampled, scored and learned from."""

from __future__ import annotations

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Fraction, NonNegative, Positive, Rate, TopK, TopP
from hpc_rlhf.spec.rewards import Rewards
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages.kind import Plot
from hpc_rlhf.spec.training import ReferredSpec, Warmup

# Charts of both stages.
REWARDS = (
    Plot("reward", "score per response", {"reward": "mean"}, held_out="reward"),
    Plot("each reward", "score per response", {}, parts="reward/"),
)
REWARD_STD = Plot("standard deviation of rewards", "reward", {"reward_std": "standard deviation"})
RESPONSES = (
    Plot("entropy", "nats per token", {"entropy": "entropy"}),
    Plot("response length", "tokens", {"answer_tokens": "mean"}, held_out="answer_tokens"),
    Plot("responses with an end of sequence", "fraction", {"eos_rate": "fraction"}, held_out="eos_rate"),
)
DRIFT = Plot("KL within a step", "nats per token", {"approx_kl": "KL from the sampling policy"})
SAMPLER = Plot("KL from the sampler", "nats per token", {"sampler_kl": "mean"})
SKIPPED = Plot("skipped optimizer steps", "per step", {"skipped": "skipped"})
PTX_LOSS = Plot("pretraining loss", "nats per token", {"ptx_loss": "mixture"})


class PolicySpec(ReferredSpec):
    """Settings of stages that learn from rewards of sampled responses."""

    warmup: Warmup = 0.1
    """Steps over which the learning rates rise from 0: a fraction of all optimizer steps, or from 1 on their number. It
    ends with the stage at the latest. DeepSpeed-Chat's 100 steps are a tenth of its run of 1.3B on one node."""
    rewards: Rewards | None = None
    """What scores the responses; the weighted sum of the scores is the reward. By default, PPO uses the model of the
    reward stage; GRPO has no default."""
    rollout: RolloutSpec = Field(default=RolloutSpec(), description="What generates the responses.")
    minibatches: Positive = Field(default=1, description="Optimizer steps per pass over the experience.")
    temperature: Rate = 1.0
    """Sampling temperature. Log-probabilities are computed at the same temperature."""
    top_p: TopP = 1.0
    top_k: TopK = 0
    stop_kl: Rate | None = None
    """Skip the remaining optimizer steps on a rollout once the actor's KL from the policy that sampled it exceeds this,
    in nats per token; about 0.02 if several passes make the actor drift."""
    cliprange: Rate = Field(default=0.2, description="Clip range of the actor's probability ratio.")
    ema: bool = False
    """Keep an exponential moving average of the actor and export it as a second model."""
    ema_beta: Fraction = Field(default=0.992, description="Decay of the moving average per optimizer step.")
    ptx: SourceSpec | None = None
    """Pretraining text to mix into the actor's optimizer steps (InstructGPT's PPO-ptx), or null."""
    ptx_coef: NonNegative = Field(default=27.8, description="Weight of the pretraining loss.")

    @model_validator(mode="after")
    def _check_rollout(self) -> PolicySpec:
        if self.rollout.engine == "vllm" and self.truncates:
            raise ValueError(
                "rollout: vllm needs top_p: 1 and top_k: 0, because its log-probabilities are of what tokens are drawn "
                "from, and those of the model in training are of the whole distribution"
            )
        return self

    @property
    def truncates(self) -> bool:
        """Whether responses are drawn from less than the whole distribution."""
        return self.top_p < 1 or self.top_k > 0

    def scores_in_update(self, micro_batches: int) -> bool:
        """Whether the forward pass with which the first update begins also gives the log-probabilities of the rollout.

        Args:
            micro_batches: of a rollout, on each rank.
        """
        return micro_batches == 1 and not self.dropout

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """How far the ratio may fall below 1, and rise above it."""
        return self.cliprange, self.cliprange

    @property
    def rewarded_by_models(self) -> bool:
        """Whether reward models score the responses."""
        return any(item.kind == "model" for item in self.rewards or ())

    @property
    def unneeded(self) -> frozenset[str]:
        judged = any(item.asks_run_model for item in self.rewards or ())
        return frozenset() if judged else frozenset({"reward"})
