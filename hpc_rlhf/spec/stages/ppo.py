"""PPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Fraction, Model, NonNegative, Positive, Rate
from hpc_rlhf.spec.stages.kind import SENT, THROUGHPUT, Data, Plot, StageKind
from hpc_rlhf.spec.stages.policy import DRIFT, PTX_LOSS, RESPONSES, REWARD_STD, REWARDS, SAMPLER, SKIPPED, PolicySpec
from hpc_rlhf.spec.training import LoraSpec, StageSpec


class CriticSpec(Model):
    """Settings of the critic that differ from the actor's. Unset fields have the actor's values."""

    zero: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed's ZeRO stage of the critic and the reward model. A critic that is much smaller than the actor is faster
    with less sharding."""
    offload_optimizer: bool | None = Field(default=None, description="Keep the critic's optimizer state in CPU memory.")
    offload_params: bool | None = None
    """Keep the critic's weights in CPU memory. Needs zero: 3 for the critic."""
    activation_checkpointing: bool | None = None
    """Recompute the critic's activations in the backward pass."""
    chunked_mlp: bool | None = Field(default=None, description="Run the critic's MLPs over a part of a pass at a time.")
    lora: LoraSpec | None = None
    """Train low-rank adapters of the critic. By default all its weights are trained, even if the actor has adapters."""


class PpoSpec(PolicySpec):
    """Proximal policy optimization (arXiv 1707.06347) of the actor against a reward model, or other rewards.

    A step is a rollout of global_batch x minibatches prompts and the optimizer steps on it.
    """

    actor_lr: Rate = Field(default=9.65e-6, description="Peak learning rate of the actor.")
    critic_lr: Rate = Field(default=5.0e-6, description="Peak learning rate of the critic.")
    ppo_epochs: Positive = Field(default=1, description="Passes over the experience of each rollout.")
    kl_coef: NonNegative = 0.1
    """Weight of the KL penalty against the reference model in the reward."""
    kl_target: Rate | None = None
    """KL from the reference model, in nats per response, toward which kl_coef is adapted from rollout to rollout (arXiv
    1909.08593); null keeps kl_coef constant. Use it if you know how far the model may move but not which coefficient
    achieves that. Needs top_p: 1 and top_k: 0, with which there is an estimate of the KL."""
    kl_horizon: Positive = 10_000
    """Responses over which kl_coef changes by the relative error of the KL, at most 20%. Needs kl_target."""
    normalize_scores: bool = False
    """Normalize scores by their running mean and standard deviation (arXiv 2307.04964), so that the other settings suit
    any reward model. score_clip, missing_eos_penalty and cliprange_value are then in standard deviations. The critic's
    outputs are normalized in the same way, because it starts from the reward model."""
    score_clip: Rate = 5.0
    """Reward scores are clipped to plus or minus this; the metric score_clipfrac shows how many are."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the clipped score of a response without an end-of-sequence token."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance 1 over all ranks, keeping their mean, as the code of arXiv
    1909.08593 does. This also rescales the KL penalty, so leave it off unless a recipe was tuned with it."""
    cliprange_value: Rate = Field(default=0.2, description="Clip range of the critic's values.")
    gamma: Fraction = Field(default=1.0, description="Discount factor.")
    lam: Fraction = Field(default=0.95, description="Lambda of generalized advantage estimation (arXiv 1506.02438).")
    whiten_advantages: bool = True
    """Normalize the advantages of a rollout to mean 0 and variance 1 over all ranks."""
    critic: CriticSpec = Field(default=CriticSpec(), description="Settings of the critic that differ from the actor's.")

    before: ClassVar[dict[str, object]] = {"warmup": 100}

    @model_validator(mode="after")
    def _check_critic(self) -> PpoSpec:
        try:
            self.of_critic.check_strategy()
        except ValueError as error:
            raise ValueError(f"critic: {error}") from None
        return self

    @property
    def of_critic(self) -> PpoSpec:
        """This spec with the critic's settings in place of the actor's."""
        own = {name: value for name, value in self.critic if value is not None}
        zero = own.get("zero", self.zero)
        inherited = {
            "offload_optimizer": self.offload_optimizer and zero > 0,
            "offload_params": self.offload_params and zero == 3,
            "lora": None,
        }
        return self.model_copy(update={**inherited, **own})

    @property
    def strategies(self) -> dict[str, StageSpec]:
        critic = self.of_critic
        judge = {"reward": critic.of_frozen} if self.rewarded_by_models else {}
        return {"": self, "critic": critic, "ref": self.of_frozen, **judge}

    @property
    def rewarded_by_models(self) -> bool:
        return self.rewards is None or super().rewarded_by_models

    @property
    def unneeded(self) -> frozenset[str]:
        return frozenset() if self.rewards is None else super().unneeded

    @model_validator(mode="after")
    def _check_kl_target(self) -> PpoSpec:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target needs a kl_coef above 0, because adapting multiplies it")
        return self

    def refusals(self) -> dict[str, str]:
        if self.kl_target is None or not self.truncates:
            return super().refusals()
        return super().refusals() | {
            "kl_target": "needs top_p: 1 and top_k: 0, because responses drawn from a part of the distribution give no "
            "estimate of its KL; leave out kl_target, or top_p and top_k"
        }


PPO = StageKind(
    name="ppo",
    title="PPO",
    spec=PpoSpec,
    description="PPO.",
    summary="PPO: the actor responds to prompts, the reward model scores the responses, the actor learns. "
    "Waits for both.",
    inputs=("pretrain", "sft", "reward"),
    requires=("reward",),
    data=Data.PROMPTS,
    sources=("ptx",),
    models=("actor", "reward"),
    average="ema",
    progress=("reward", "kl"),
    ranking=("reward",),
    held_out=("reward",),
    scores=frozenset({"reward"}),
    result="reward {reward_first} → {reward_last} (first std {reward_first_std}), KL {kl_first} → {kl_last}",
    plots=(
        *REWARDS,
        Plot("KL from the SFT model", "nats per response", {"kl": "KL"}, held_out="kl"),
        *RESPONSES,
        Plot("clip fractions", "fraction of tokens", {"clipfrac": "actor", "value_clipfrac": "critic"}),
        Plot("clipped scores", "fraction", {"score_clipfrac": "fraction"}),
        Plot("gradient norms", "before clipping", {"actor_grad_norm": "actor", "critic_grad_norm": "critic"}),
        SKIPPED,
        DRIFT,
        SAMPLER,
        REWARD_STD,
        Plot("actor loss", "per token", {"actor_loss": "actor"}),
        Plot("critic loss", "reward squared", {"critic_loss": "critic"}),
        PTX_LOSS,
        Plot("pretraining loss, weighted", "fraction of the actor's", {"ptx_share": "fraction"}),
        Plot("explained variance", "fraction of the returns'", {"explained_variance": "fraction"}),
        Plot("KL coefficient", "reward per nat", {"kl_coef": "coefficient"}),
        Plot("actor learning rate", "per step", {"actor_lr": "learning rate"}),
        THROUGHPUT,
        SENT,
    ),
)
