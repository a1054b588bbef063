"""The stages of a run, and every number in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.data import SourceSpec
from hpc_rlhf.spec.fields import Fraction, Model, NonNegative, Positive, Rate
from hpc_rlhf.spec.training import LoraSpec, ReferredSpec, StageSpec, TrainingSpec

TopP = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Sample from the smallest set of tokens with this probability; 1 samples from all.",
    ),
]
TopK = Annotated[int, Field(ge=0, description="Sample from the k likeliest tokens; 0 samples from all.")]

STAGE_NAMES = ("sft", "reward", "ppo", "dpo", "eval")


class SftSpec(TrainingSpec):
    """Supervised fine-tuning on prompts and chosen answers."""

    lr: Rate = Field(default=9.65e-6, description="Peak learning rate.")
    answer_only: bool = Field(default=False, description="Learn the answers' tokens only, not the prompts'.")


class RewardSpec(TrainingSpec):
    """The reward model, trained on pairs of a chosen and a rejected answer. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")


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


class DpoSpec(ReferredSpec):
    """Direct preference optimisation (arXiv 2305.18290) on pairs, in place of the reward model and PPO. A sample is a pair.

    It starts from the SFT model, if there is one. That is also the reference; with lora.only the adapters switched
    off are, and no second model takes memory.
    """

    lr: Rate = Field(
        default=1.0e-6,
        description="Peak learning rate. Far below that of fine-tuning: both answers soon become unlikely at a higher one.",
    )
    beta: Rate = Field(
        default=0.1,
        description="What a departure from the reference costs: a higher one keeps the model closer to it.",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0,
        description="Share of the pairs thought to be the wrong way round; above 0 where the preferences are noisy.",
    )

    @property
    def strategies(self) -> dict[str, StageSpec]:
        return {"": self, "ref": self.of_frozen}


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


class StagesSpec(Model):
    """The stages to run. PPO and DPO start from the SFT model, if there is one; PPO needs a reward model."""

    sft: SftSpec | None = Field(default=None, description="Supervised fine-tuning.")
    reward: RewardSpec | None = Field(default=None, description="Reward model.")
    ppo: PpoSpec | None = Field(default=None, description="PPO.")
    dpo: DpoSpec | None = Field(
        default=None,
        description="DPO: learn from pairs without a reward model and without sampling. Less memory and time than PPO, and nothing to tune but lr and beta; PPO goes further where the reward model is good.",
    )
    eval: EvalSpec | None = Field(
        default=None,
        description="Evaluation of all models on held-out data, once the other stages are done. {} takes all defaults.",
    )

    @model_validator(mode="after")
    def _sound(self) -> StagesSpec:
        if not any((self.sft, self.reward, self.ppo, self.dpo)):
            raise ValueError("name at least one stage: sft, reward, ppo or dpo")
        if self.ppo is not None and self.reward is None:
            raise ValueError("ppo needs the reward stage")
        return self
