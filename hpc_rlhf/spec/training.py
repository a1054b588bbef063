"""Settings that stages share: how a model is trained, and how it is held in memory."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.fields import AUTO, DURATION, Duration, Fraction, Model, Name, NonNegative, Positive, Rate


def _checkpoint_interval(raw: object) -> object:
    if isinstance(raw, int) and not isinstance(raw, bool) and 1 <= raw < 2**31:
        return raw
    if raw == "auto" or (isinstance(raw, str) and re.fullmatch(DURATION, raw)):
        return raw
    raise ValueError("must be a number of steps, a duration such as 10 min, or auto")


def _warmup(raw: object) -> object:
    whole = isinstance(raw, int) and not isinstance(raw, bool)
    if (whole and 0 <= raw < 2**31) or (isinstance(raw, float) and 0 <= raw < 1):  # type: ignore[operator]
        return raw
    raise ValueError("must be a whole number of steps, or a fraction of all steps below 1, such as 0.1")


# Optimizer steps over which a learning rate rises, as a fraction of all of them, or as their number.
Warmup = Annotated[
    int | float,
    BeforeValidator(_warmup),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}]}
    ),
]


def _eval_interval(raw: object) -> object:
    if isinstance(raw, int) and not isinstance(raw, bool) and 1 <= raw < 2**31:
        return raw
    if isinstance(raw, float) and 0 < raw < 1:
        return raw
    raise ValueError("must be a number of steps, or a fraction of the stage's steps such as 0.1")


def _or_auto(**schema: object) -> WithJsonSchema:
    """The JSON Schema of a field that also takes the word auto."""
    return WithJsonSchema({"anyOf": [schema, {"const": AUTO}]})


class LoraSpec(Model):
    """Low-rank adaptation of the linear layers and experts (arXiv 2106.09685). Merged into the weights on export."""

    rank: Positive = Field(description="Rank of the update.")
    alpha: Rate | None = Field(default=None, description="The update is scaled by alpha / rank. Defaults to the rank.")
    targets: tuple[Name, ...] | None = None
    """Names of the linear modules to adapt, such as q_proj; by default, all except the output head."""
    only: bool = True
    """Train only the adapters. false also trains all weights without adapters."""
    experts: bool = True
    """Adapt the experts of mixture-of-experts layers too, each with factors of this rank. targets selects them by the
    names of their parameters, such as gate_up_proj and down_proj. A router is adapted only if it is a plain linear
    layer."""

    before: ClassVar[dict[str, object]] = {"experts": False}


class StageSpec(Model):
    """Settings of all stages."""

    micro_batch: Annotated[Positive, _or_auto(type="integer", minimum=1)] = 4
    """Samples of maximum length that one GPU processes in a forward and backward pass. Shorter samples are packed
    without padding, so a pass holds more of them. auto chooses the fastest size that fits, based on the estimates of
    `hpc-rlhf plan`; it needs slurm.gpu and global_batch."""
    zero: Annotated[Literal[0, 1, 2, 3], _or_auto(enum=[0, 1, 2, 3])] = 0
    """DeepSpeed's ZeRO stage, which sets what is sharded over the ranks: 0 nothing, 1 the optimizer state, 2 also the
    gradients, 3 also the weights. Higher stages need less memory and more communication. auto chooses the fastest that
    fits; it needs slurm.gpu."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward and backward passes."""
    offload_params: bool = False
    """Keep the weights in CPU memory and copy each layer to the GPU when it is needed. For models whose shards alone do
    not fit on the GPUs; every pass waits for the transfers. Needs zero: 3."""
    slurm: SlurmSpec = SlurmSpec()
    """Slurm settings of this stage. They override the top-level slurm."""

    # What earlier versions did without a field, or by another default: runs that they began go on with that.
    before: ClassVar[dict[str, object]] = {}

    @model_validator(mode="after")
    def _check_strategy(self) -> StageSpec:
        self.check_strategy()
        return self

    def check_strategy(self) -> None:
        """Raise ValueError if the optimizer, ZeRO and offload settings are incompatible."""
        if self.offload_params and self.zero != 3:
            raise ValueError("offload_params needs zero: 3, because only ZeRO-3 fetches weights layer by layer")

    @property
    def strategies(self) -> dict[str, StageSpec]:
        """How each model of the stage is held in memory, by role; the one in training has the empty name."""
        return {"": self}

    @property
    def pipeline_stages(self) -> int:
        """Stages that the layers of the model in training are divided over."""
        return 1

    @property
    def unneeded(self) -> frozenset[str]:
        """Inputs of its kind that a stage with these settings does not use."""
        return frozenset()

    def refusals(self) -> dict[str, str]:
        """Fields whose values are refused, and why. Runs that earlier versions began with them go on."""
        return {}


class TrainingSpec(StageSpec):
    """Settings of all stages that train."""

    epochs: Positive = Field(default=1, description="Passes over the stage's data.")
    max_steps: Positive | None = Field(default=None, description="Stop after this many steps, even if epochs remain.")
    global_batch: Positive | None = None
    """Samples per optimizer step over all GPUs; defaults to micro_batch times ranks. Gradient accumulation follows from
    it."""
    warmup: Warmup = 0.03
    """Steps over which the learning rate rises from 0: a fraction of all optimizer steps, or from 1 on their number. It
    ends with the stage at the latest. 0.03 is what Tülu 3 fine-tunes with (arXiv 2411.15124)."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate schedule after the warm-up. cosine and linear fall until the stage's last step, even if steps were
    skipped on the way, because a gradient overflowed or by stop_kl. wsd (warmup-stable-decay, arXiv 2404.06395) stays
    at the peak, and falls linearly in the last steps."""
    decay: Warmup = 0.1
    """Steps at the end in which wsd falls: a fraction of all optimizer steps, or from 1 on their number."""
    decay_to: Fraction = 0.0
    """Where cosine, linear and wsd end, as a fraction of the peak; 0.1 is common in pretraining."""
    weight_decay: NonNegative = Field(default=0.0, description="AdamW's weight decay, on matrices only.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="Adam's betas.")
    eps: Rate = 1.0e-8
    """Adam's epsilon, added to the root of the variance. A larger one, such as 1e-5 (arXiv 2403.17031), damps steps of
    weights that rarely get a gradient."""
    clip_grad: Rate = Field(default=1.0, description="Gradients are clipped to this norm.")
    tensor_parallel: Positive = 1
    """Size of the groups of neighboring ranks on a node that split every layer, the embeddings and the output head
    (Megatron-LM, arXiv 1909.08053) and process the same samples. For models that do not fit on one GPU, on nodes with
    fast links between GPUs: unlike ZeRO-3, no weights are gathered, but the ranks of a group synchronize several times
    per layer. Each has some of the experts of a mixture. Needs zero: 0, 1 or 2, and a number of attention heads, and of
    experts, that it divides. Embeddings and head stay whole if it does not divide the vocabulary, and the head also if
    the model changes its logits, as Gemma 2 and Cohere do. The models of an evaluation are not split."""
    sequence_parallel: Positive = 1
    """Size of the groups of neighboring ranks that share the tokens of each packed row (DeepSpeed-Ulysses, arXiv
    2309.14509) and process the same samples. For sequences whose activations do not fit on one GPU: each rank keeps
    those of its tokens. Around attention, which sees all tokens, the ranks of a group exchange tokens for heads. It
    works with any zero, which shards over these ranks as well, and needs a number of attention heads that it divides.
    """
    optimizer: Literal["adamw", "onebit-adam"] = "adamw"
    """onebit-adam (arXiv 2102.02888) sends about a thirtieth of AdamW's bytes between ranks, for slow networks. It
    takes 4 more bytes of memory per weight and needs zero: 0."""
    onebit_warmup: Positive = 100
    """Steps during which onebit-adam runs as AdamW before it freezes the variance. Choose more than the learning rate's
    warm-up, about a seventh of all steps."""
    offload: Literal["auto"] | None = None
    """auto chooses offload_optimizer, offload_params and offload_frozen: the fastest combination that fits. Needs
    slurm.gpu, and these three must not be set. A run keeps the choice."""
    offload_optimizer: bool = False
    """Keep the optimizer state, 12 bytes per weight, in CPU memory and update the weights there. For models that do not
    fit otherwise; every step waits for the CPU. Needs zero: 1 or higher."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    chunked_mlp: bool = False
    """For passes longer than 4,096 tokens: run the MLP of each layer over that many at a time, and recompute it in the
    backward pass, also under activation_checkpointing. The activations inside an MLP then exist for one part only; a
    pass takes about a fifth more time. For most models without experts, but not OPT."""
    dropout: Fraction = Field(default=0.0, description="Dropout during training.")
    lora: LoraSpec | None = None
    """Train low-rank adapters instead of all weights (in PPO: of the actor)."""
    checkpoint_every: Annotated[int | str, BeforeValidator(_checkpoint_interval)] = "auto"
    """How often to save: a number of steps, a duration such as 10 min, or auto. auto minimizes the time lost, using the
    measured cost of a checkpoint (Young and Daly: the square root of 2 * cost * mttf). A checkpoint is also written
    whenever the stage has to stop."""
    mttf: Duration = "24 h"
    """Mean time between failures without warning, such as the loss of a node or process; for checkpoint_every: auto.
    Preemptions and time limits come with a warning and do not count. A day suits a few nodes; use a few hours for
    hundreds of GPUs or an unreliable cluster."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, description="Number of checkpoints to keep.")
    eval_every: Annotated[int | float, BeforeValidator(_eval_interval)] | None = None
    """How often to evaluate on held-out data during training: a number of steps, or a fraction of the stage's steps
    such as 0.1. null evaluates only at the end, and PPO and GRPO not at all. It changes nothing in training itself.
    PPO and GRPO then answer up to 256 held-out prompts each time, also before the first step. Needs data.held_out."""
    keep_best: Name | None = None
    """Hand on the weights that were best by this held-out metric at any of the evaluations during training or at its
    end: perplexity or loss in pretraining and SFT; accuracy, loss or margin for the reward model, in DPO and in KTO;
    reward in PPO and GRPO. null hands on the last weights. The best ones so far, and the moving average at that step,
    are kept in host memory and in the checkpoints. Needs eval_every."""

    def eval_interval(self, total: int) -> int:
        """Steps from one evaluation during training to the next, in a stage of ``total`` steps; 0 if there are none."""
        every = self.eval_every or 0
        return every if isinstance(every, int) else max(1, round(every * total))

    before: ClassVar[dict[str, object]] = {"warmup": 0}

    def refusals(self) -> dict[str, str]:
        if self.max_steps is None or self.warmup < max(1, self.max_steps):
            return {}
        what = f"is {self.warmup} steps, but the stage ends after max_steps: {self.max_steps}"
        return {"warmup": f"{what}; a fraction such as 0.1 always fits"}

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.optimizer == "onebit-adam" and self.zero != 0:
            raise ValueError(
                "onebit-adam needs zero: 0, because every rank compresses the momentum of all weights, and under ZeRO "
                "a rank has only a shard of them"
            )
        if self.tensor_parallel > 1 and self.zero == 3:
            raise ValueError(
                "tensor_parallel needs zero: 0, 1 or 2, because ZeRO-3 shards the same layers; use one or the other"
            )
        if self.tensor_parallel > 1 and self.optimizer == "onebit-adam":
            raise ValueError(
                "tensor_parallel needs optimizer: adamw, because onebit-adam averages momenta over all ranks, which "
                "hold different parts of the layers"
            )
        if self.sequence_parallel > 1 and self.optimizer == "onebit-adam":
            raise ValueError(
                "sequence_parallel needs optimizer: adamw, because onebit-adam compresses the momentum of each rank, "
                "which then follows from a part of the tokens"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError(
                "offload_optimizer needs zero: 1 or higher, because it moves ZeRO's shard of the optimizer state"
            )


class PipelinedSpec(TrainingSpec):
    """Settings of stages that learn given text."""

    pipeline_parallel: Positive = 1
    """Number of stages that the model's layers are divided into, balanced by parameters, each on ranks of its own
    (DeepSpeed's pipeline engine). For models that do not fit on a node: only hidden states pass between stages.
    Micro-batches go through the stages one after another; while the pipeline fills and drains, a step loses the share
    (stages - 1) / (micro-batches + stages - 1), so accumulate at least four times as many micro-batches as there are
    stages. Needs zero: 1, or zero: 0 in fp32; not with sequence_parallel, lora, dropout, offload_optimizer, keep_best
    or onebit-adam."""

    @property
    def pipeline_stages(self) -> int:
        return self.pipeline_parallel

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.pipeline_parallel == 1:
            return
        needs = [
            (self.zero < 2, "zero: 0 or 1, because ZeRO-2 and ZeRO-3 communicate in every pass of a micro-batch"),
            (self.zero == 1 or self.precision == "fp32", "zero: 1, except with precision: fp32"),
            (self.sequence_parallel == 1, "sequence_parallel: 1, because each stage would exchange tokens as well"),
            (
                self.optimizer == "adamw",
                "optimizer: adamw, because onebit-adam averages momenta over all ranks, which hold different layers",
            ),
            (not self.offload_optimizer, "offload_optimizer: false"),
            (self.lora is None, "a stage without lora; a model with adapters fits with zero: 3"),
            (self.dropout == 0, "dropout: 0, because its random numbers would be the same in every stage"),
            (self.keep_best is None, "a stage without keep_best, which keeps the weights of whole models"),
        ]
        for met, what in needs:
            if not met:
                raise ValueError(f"pipeline_parallel needs {what}")


class ReferredSpec(TrainingSpec):
    """Settings of stages that compare the model in training with frozen models."""

    offload_frozen: bool = False
    """Keep the weights of the frozen models (reference and reward model) in CPU memory, sharded over the ranks, and
    copy them to the GPU layer by layer. They are used only once per response, and the freed memory allows larger
    micro-batches."""

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.tensor_parallel > 1 and self.offload_frozen:
            raise ValueError(
                "offload_frozen needs tensor_parallel: 1, because it shards the frozen models with ZeRO-3; "
                "tensor_parallel also reduces their memory"
            )

    @property
    def of_frozen(self) -> StageSpec:
        """The settings of a frozen copy of the model in training."""
        offload = {"zero": 3, "offload_params": True} if self.offload_frozen else {}
        return self.model_copy(update={"offload_optimizer": False, **offload})


class PreferenceSpec(ReferredSpec):
    """Settings of stages in which a policy learns from preferences alone, such as DPO.

    It starts from the SFT model, if there is one, which is also the reference. With lora.only the reference
    is the model with its adapters disabled, so no second model takes memory.
    """

    lr: Rate = 1.0e-6
    """Peak learning rate. Much lower than for fine-tuning: at a higher one, good responses soon become unlikely, too.
    KTO's paper (arXiv 2402.01306) recommends 5e-7 to 5e-6."""
    warmup: Warmup = 0.1
    """Steps over which the learning rate rises from 0: a fraction of all optimizer steps, or from 1 on their number. It
    ends with the stage at the latest. 0.1 is that of Tülu 3's DPO (arXiv 2411.15124)."""
    beta: Rate = 0.1
    """Strength of the pull toward the reference: a higher value keeps the model closer to it."""

    @property
    def strategies(self) -> dict[str, StageSpec]:
        return {"": self, "ref": self.of_frozen}
