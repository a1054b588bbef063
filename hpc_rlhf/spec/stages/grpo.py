"""GRPO and its relatives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import NonNegative, Positive, Rate
from hpc_rlhf.spec.stages.kind import GRADIENT, LEARNING_RATE, SENT, THROUGHPUT, Data, Plot, StageKind
from hpc_rlhf.spec.stages.policy import DRIFT, PTX_LOSS, RESPONSES, REWARD_STD, REWARDS, SAMPLER, SKIPPED, PolicySpec
from hpc_rlhf.spec.training import StageSpec


class GrpoSpec(PolicySpec):
    """Group relative policy optimization (arXiv 2402.03300): each response is compared with the others to the same
    prompt, so there is no critic.

    A step is a rollout of global_batch x minibatches responses, group_size to a prompt, and the optimizer steps on it.
    """

    lr: Rate = Field(default=1.0e-6, description="Peak learning rate, by default that of the GRPO paper and of DAPO.")
    group_size: Annotated[int, Field(ge=2, le=1024)] = 8
    """Responses to each prompt. On each rank, global_batch x minibatches / ranks must be a multiple of it."""
    advantage: Literal["grpo", "rloo", "dr_grpo", "reinforce++"] = "grpo"
    """How a reward becomes an advantage. grpo: its distance from the group's mean, in standard deviations. dr_grpo: the
    same without the division (arXiv 2503.20783). rloo: its distance from the others' mean (arXiv 2402.14740).
    reinforce++: the rewards from each token on, summed and normalized over the batch (arXiv 2501.03262)."""
    num_iterations: Positive = Field(default=1, description="Passes over the experience of each rollout.")
    kl_coef: NonNegative = 0.0
    """Weight of the KL penalty against the reference: the model before training. 0 needs no reference model; nor does
    lora.only, where the actor with its adapters disabled is the reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: the k3 estimator is added to the loss, as in GRPO. reward: the k1 estimator is subtracted from the reward,
    as in PPO, RLOO and REINFORCE++."""
    cliprange_high: Rate | None = None
    """Upper clip range of the ratio, if it differs from cliprange: 0.28 in DAPO (arXiv 2503.14476)."""
    loss_normalization: Literal["token", "sequence", "constant"] = "token"
    """What the loss is a mean over: all tokens of a minibatch (DAPO); the responses, each a mean over its tokens
    (GRPO); or the responses, each a sum over its tokens, divided by max_answer_tokens (Dr. GRPO)."""
    dynamic_sampling: Positive | None = None
    """Replace prompts whose responses all have the same reward with the next prompts (DAPO), in at most this many
    further rollouts per step; after that, any that are left stay. null keeps all prompts."""
    overlong: Literal["mask", "penalty"] | None = None
    """What happens to responses that reach max_answer_tokens. mask: they do not take part in the loss. penalty: the
    reward falls linearly by up to 1 over the last overlong_margin tokens (DAPO). null: nothing."""
    overlong_margin: Positive | None = None
    """Tokens over which the penalty on long responses grows; by default a fifth of max_answer_tokens."""

    @property
    def clip_ranges(self) -> tuple[float, float]:
        return self.cliprange, self.cliprange if self.cliprange_high is None else self.cliprange_high

    @property
    def mean_over(self) -> Literal["tokens", "responses"]:
        """What the loss is a mean over, after the weights of ``loss_normalization``."""
        return "tokens" if self.loss_normalization == "token" else "responses"

    @property
    def updates_once(self) -> bool:
        """Whether the actor is updated once by each rollout, and no advantage depends on log-probabilities, as it does
        where another engine drew the responses. These are then those of the update's own forward pass, and none is made
        for them alone."""
        once = self.num_iterations == self.minibatches == 1 and not self.dropout
        return once and self.kl_in == "loss" and self.advantage != "reinforce++" and self.rollout.engine != "vllm"

    def scores_in_update(self, micro_batches: int) -> bool:
        return self.updates_once or super().scores_in_update(micro_batches)

    @property
    def strategies(self) -> dict[str, StageSpec]:
        own_ref = self.kl_coef > 0 and not (self.lora is not None and self.lora.only)
        used = {"ref": own_ref, "reward": self.rewarded_by_models}
        return {"": self, **{role: self.of_frozen for role, is_used in used.items() if is_used}}

    def refusals(self) -> dict[str, str]:
        missing = {} if self.rewards else {"rewards": "grpo needs some, such as [{math: answer}] or [{model: reward}]"}
        return super().refusals() | missing

    @model_validator(mode="after")
    def _check_rewards(self) -> GrpoSpec:
        if self.overlong_margin is not None and self.overlong != "penalty":
            raise ValueError("overlong_margin is for overlong: penalty")
        if self.kl_in == "reward" and self.kl_coef and self.truncates:
            raise ValueError("kl_in: reward needs top_p: 1 and top_k: 0, with which there is an estimate of the KL")
        return self


GRPO = StageKind(
    name="grpo",
    title="GRPO",
    spec=GrpoSpec,
    description="GRPO, RLOO and their relatives: learn from rewards, such as those that check an answer, without a "
    "critic.",
    summary="GRPO: the actor responds several times to each prompt, rewards score the responses, the actor learns.",
    inputs=("pretrain", "sft", "reward"),
    requires=("reward",),
    data=Data.PROMPTS,
    sources=("ptx",),
    models=("actor", "reward"),
    average="grpo_ema",
    progress=("reward", "frac_reward_zero_std"),
    ranking=("reward",),
    held_out=("reward",),
    scores=frozenset({"reward"}),
    result="reward {reward_first} → {reward_last} (first std {reward_first_std})",
    plots=(
        *REWARDS,
        REWARD_STD,
        Plot("prompts without a difference", "fraction", {"frac_reward_zero_std": "all rewards equal"}),
        Plot("KL from the start", "nats per response", {"kl": "KL"}, held_out="kl"),
        *RESPONSES,
        Plot("responses that take no part", "fraction", {"masked": "fraction"}),
        Plot("failed rewards", "responses", {"rewards_failed": "failed"}),
        Plot("clip fraction", "fraction of tokens", {"clipfrac": "clipped"}),
        DRIFT,
        SAMPLER,
        Plot("loss", "per token or response", {"loss": "loss"}),
        PTX_LOSS,
        GRADIENT,
        SKIPPED,
        LEARNING_RATE,
        THROUGHPUT,
        SENT,
    ),
)
