"""PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Fraction, Model, NonNegative, Positive, Rate
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages.kind import SENT, THROUGHPUT, Data, Plot, StageKind
from hpc_rlhf.spec.stages.sampling import TopK, TopP
from hpc_rlhf.spec.training import LoraSpec, ReferredSpec, StageSpec


class CriticSpec(Model):
    """How the critic is trained, where that differs from the actor. What is left out is the actor's."""

    zero: Literal[0, 1, 2, 3] | None = Field(
        default=None,
        description="DeepSpeed's ZeRO stage of the critic and of the reward model. A critic much smaller than the actor is faster with less sharding.",
    )
    offload_optimizer: bool | None = Field(
        default=None, description="Keep the state of the critic's optimizer in CPU memory."
    )
    offload_params: bool | None = Field(
        default=None, description="Keep the critic's weights in CPU memory; needs its zero to be 3."
    )
    activation_checkpointing: bool | None = Field(
        default=None, description="Compute the critic's activations again in the backward pass."
    )
    lora: LoraSpec | None = Field(
        default=None,
        description="Train low-rank adapters of the critic. Left out, all of it is trained, also where the actor has adapters.",
    )


class PpoSpec(ReferredSpec):
    """Proximal policy optimisation (arXiv 1707.06347) of the actor against the reward model.

    One step is one rollout of global_batch x minibatches prompts and the optimizer steps on it.
    """

    warmup: Annotated[int, Field(ge=0)] = Field(
        default=100, description="Optimizer steps over which the learning rates rise from 0."
    )
    actor_lr: Rate = Field(default=9.65e-6, description="Peak learning rate of the actor.")
    critic_lr: Rate = Field(default=5.0e-6, description="Peak learning rate of the critic.")
    ppo_epochs: Positive = Field(default=1, description="Passes over each rollout's experience.")
    minibatches: Positive = Field(default=1, description="Optimizer steps in one pass over the experience.")
    temperature: Rate = Field(
        default=1.0, description="Sampling temperature; log-probabilities are taken at the same one."
    )
    top_p: TopP = 1.0
    top_k: TopK = 0
    kl_coef: NonNegative = Field(
        default=0.1, description="Weight of the KL penalty against the SFT model in the reward."
    )
    kl_target: Rate | None = Field(
        default=None,
        description="KL from the SFT model, in nats an answer, towards which kl_coef is steered from rollout to rollout (arXiv 1909.08593); null leaves kl_coef as it is. For when one knows how far the model may go, but not what that takes.",
    )
    kl_horizon: Positive = Field(
        default=10_000,
        description="Answers over which kl_coef changes by the relative error of the KL, at most 20 %, where there is a kl_target.",
    )
    normalize_scores: bool = Field(
        default=False,
        description="Count scores from their running mean in running standard deviations (arXiv 2307.04964), so that the other numbers here fit any reward model. score_clip and missing_eos_penalty are then in standard deviations.",
    )
    score_clip: Rate = Field(default=5.0, description="Reward scores are clipped to plus or minus this.")
    missing_eos_penalty: NonNegative = Field(
        default=0.0, description="Taken off the score of an answer that does not end."
    )
    whiten_rewards: bool = Field(
        default=False,
        description="Bring the per-token rewards of a rollout to variance 1 around their mean, over all ranks, as the code of arXiv 1909.08593 does. It also rescales the KL penalty, so leave it off unless a recipe was tuned with it.",
    )
    stop_kl: Rate | None = Field(
        default=None,
        description="Leave out the remaining optimizer steps of a rollout once the actor's KL from the one that sampled is above this, in nats a token; about 0.02, where several ppo_epochs make the actor drift.",
    )
    cliprange: Rate = Field(default=0.2, description="Clip range of the actor's probability ratio.")
    cliprange_value: Rate = Field(default=0.2, description="Clip range of the critic's values.")
    gamma: Fraction = Field(default=1.0, description="Discount.")
    lam: Fraction = Field(
        default=0.95, description="Lambda of generalised advantage estimation (arXiv 1506.02438)."
    )
    whiten_advantages: bool = Field(
        default=True,
        description="Bring the advantages of a rollout to mean 0 and variance 1, over all ranks.",
    )
    ema: bool = Field(
        default=False,
        description="Keep an exponential moving average of the actor, and export it as a second model.",
    )
    ema_beta: Fraction = Field(
        default=0.992, description="Decay of the moving average at each optimizer step."
    )
    ptx: SourceSpec | None = Field(
        default=None,
        description="Pretraining text mixed into the actor's optimizer steps (InstructGPT's PPO-ptx), or null.",
    )
    ptx_coef: NonNegative = Field(default=27.8, description="Weight of the pretraining loss.")
    critic: CriticSpec = Field(
        default=CriticSpec(), description="How the critic is trained, where that differs from the actor."
    )

    @model_validator(mode="after")
    def _critic_sound(self) -> PpoSpec:
        try:
            self.of_critic.check_strategy()
        except ValueError as error:
            raise ValueError(f"critic: {error}") from None
        return self

    @property
    def of_critic(self) -> PpoSpec:
        """This spec with the critic's own settings in place of the actor's."""
        own = {name: value for name, value in self.critic if value is not None}
        zero = own.get("zero", self.zero)
        followed = {
            "offload_optimizer": self.offload_optimizer and zero > 0,
            "offload_params": self.offload_params and zero == 3,
            "lora": None,
        }
        return self.model_copy(update={**followed, **own})

    @property
    def strategies(self) -> dict[str, StageSpec]:
        critic = self.of_critic
        return {"": self, "critic": critic, "ref": self.of_frozen, "reward": critic.of_frozen}

    @model_validator(mode="after")
    def _steerable(self) -> PpoSpec:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target needs a kl_coef above 0 to start from, because steering multiplies it"
            )
        return self


PPO = StageKind(
    name="ppo",
    title="PPO",
    spec=PpoSpec,
    description="PPO.",
    summary="PPO: the actor answers prompts, the reward model scores the answers, the actor learns. Waits for both.",
    inputs=("sft", "reward"),
    requires=("reward",),
    data=Data.PROMPTS,
    sources=("ptx",),
    models=("actor", "reward"),
    average="ema",
    progress=("reward", "kl"),
    ranking=("reward",),
    scores=frozenset({"reward"}),
    result="reward {reward_first} → {reward_last} (first std {reward_first_std}), KL {kl_first} → {kl_last}",
    plots=(
        Plot("reward", "score of an answer", {"reward": "mean"}),
        Plot("KL from the SFT model", "nats an answer", {"kl": "KL"}),
        Plot("entropy", "nats a token", {"entropy": "entropy"}),
        Plot("length of answers", "tokens", {"answer_tokens": "mean"}),
        Plot("answers that end by themselves", "share", {"eos_rate": "share"}),
        Plot("clip fractions", "share of tokens", {"clipfrac": "actor", "value_clipfrac": "critic"}),
        Plot("move within a step", "nats a token", {"approx_kl": "KL from the sampling actor"}),
        Plot("spread of rewards", "standard deviation", {"reward_std": "spread"}),
        Plot("loss of the actor", "a token", {"actor_loss": "actor"}),
        Plot("loss of the critic", "reward squared", {"critic_loss": "critic"}),
        Plot("explained variance", "share of the returns'", {"explained_variance": "share"}),
        Plot("KL coefficient", "reward a nat", {"kl_coef": "coefficient"}),
        Plot("learning rate of the actor", "a step", {"actor_lr": "learning rate"}),
        THROUGHPUT,
        SENT,
    ),
)
