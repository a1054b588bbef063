"""The stages of a run, and every number in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.data import SourceSpec
from hpc_rlhf.spec.fields import Fraction, Model, Name, NonNegative, Positive, Rate

STAGE_NAMES = ("sft", "reward", "ppo", "dpo", "eval")


class LoraSpec(Model):
    """Low-rank adaptation of the linear layers (arXiv 2106.09685). Merged into the weights on export."""

    rank: Positive = Field(description="Rank of the update.")
    alpha: Rate | None = Field(
        default=None, description="The update is scaled by alpha / rank; alpha is the rank when left out."
    )
    targets: tuple[Name, ...] | None = Field(
        default=None,
        description="Names of the linear modules to adapt, such as q_proj; all but the output head when left out.",
    )
    only: bool = Field(
        default=True,
        description="Train only the adapters. False also trains every weight that is not adapted.",
    )


class StageSpec(Model):
    """What all stages have in common."""

    micro_batch: Positive = Field(
        default=4,
        description="Samples of the greatest length that one forward and backward pass on one GPU has memory for. Shorter ones are laid end to end without padding, so that a pass holds more of them.",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="DeepSpeed's ZeRO stage: what is sharded over the ranks. 0 nothing, 1 optimizer, 2 and gradients, 3 and weights. Higher needs less memory and more traffic.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Precision of the forward and backward passes."
    )
    offload_params: bool = Field(
        default=False,
        description="Keep the weights in CPU memory and bring each layer to the GPU when it is its turn. For a model whose shards alone do not fit the GPUs: every pass waits for the bus. Needs zero: 3.",
    )
    slurm: SlurmSpec = Field(
        default=SlurmSpec(), description="Slurm settings of this stage, over those of the top-level slurm."
    )

    @model_validator(mode="after")
    def _strategy_sound(self) -> StageSpec:
        self.check_strategy()
        return self

    def check_strategy(self) -> None:
        """Raises ValueError where settings of optimizer, ZeRO and offload do not go together."""
        if self.offload_params and self.zero != 3:
            raise ValueError("offload_params needs zero: 3, which alone fetches weights layer by layer")

    @property
    def strategies(self) -> dict[str, StageSpec]:
        """How each of the stage's models is held in memory, by the model's name; the one trained has none."""
        return {"": self}


class TrainingSpec(StageSpec):
    """What all stages that train have in common."""

    epochs: Positive = Field(default=1, description="Passes over the stage's data.")
    max_steps: Positive | None = Field(
        default=None, description="Stop after this many steps even if epochs are left."
    )
    global_batch: Positive | None = Field(
        default=None,
        description="Samples in one optimizer step over all GPUs; micro_batch times ranks when left out. Accumulation follows from it.",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Optimizer steps over which the learning rate rises from 0."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up."
    )
    weight_decay: NonNegative = Field(default=0.0, description="AdamW's weight decay, on matrices only.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="Adam's betas.")
    clip_grad: Rate = Field(default=1.0, description="Largest norm of the gradient.")
    optimizer: Literal["adamw", "onebit-adam"] = Field(
        default="adamw",
        description="onebit-adam sends about a thirtieth of AdamW's bytes between ranks (arXiv 2102.02888), for nodes on a slow network; it takes 4 more bytes of memory a weight, and zero: 0.",
    )
    onebit_warmup: Positive = Field(
        default=100,
        description="Steps that onebit-adam is AdamW before it freezes the variance: past the learning rate's warm-up, and about a seventh of all.",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="Keep the optimizer's state, 12 bytes a weight, in CPU memory and update the weights there. For a model that does not fit the GPUs otherwise: a step waits for the CPU. Needs zero: 1 or more.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep fewer activations and compute them again in the backward pass: less memory, about a third more time.",
    )
    dropout: Fraction = Field(default=0.0, description="Dropout while training.")
    lora: LoraSpec | None = Field(
        default=None,
        description="Train low-rank adapters in place of the whole model (in PPO: of the actor).",
    )
    checkpoint_every: Positive = Field(
        default=100,
        description="Steps between checkpoints. One is also written whenever the stage is told to stop.",
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, description="Checkpoints kept.")

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.optimizer == "onebit-adam" and self.zero != 0:
            raise ValueError(
                "onebit-adam needs zero: 0, because every rank compresses the momentum of all weights, and "
                "ZeRO leaves it only a share of them"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError(
                "offload_optimizer needs zero: 1 or more, because it is ZeRO's share of the optimizer that is moved"
            )


class SftSpec(TrainingSpec):
    """Supervised fine-tuning on prompts and chosen answers."""

    lr: Rate = Field(default=9.65e-6, description="Peak learning rate.")
    answer_only: bool = Field(default=False, description="Learn the answers' tokens only, not the prompts'.")


class RewardSpec(TrainingSpec):
    """The reward model, trained on pairs of a chosen and a rejected answer. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")


class ReferredSpec(TrainingSpec):
    """What stages have in common that hold the model in training against frozen ones."""

    offload_frozen: bool = Field(
        default=False,
        description="Keep the weights of frozen models, the reference and the reward model, in CPU memory, sharded over the ranks, and bring them to the GPU layer by layer. They are asked but once for each answer; their memory goes to larger micro-batches.",
    )

    @property
    def of_frozen(self) -> StageSpec:
        """This spec as the frozen counterpart of the model in training takes it."""
        offload = {"zero": 3, "offload_params": True} if self.offload_frozen else {}
        return self.model_copy(update={"offload_optimizer": False, **offload})


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
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Sample from the smallest set of tokens with this probability; 1 samples from all.",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sample from the k likeliest tokens; 0 samples from all."
    )
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
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Sample from the smallest set of tokens with this probability; 1 samples from all.",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sample from the k likeliest tokens; 0 samples from all."
    )


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
