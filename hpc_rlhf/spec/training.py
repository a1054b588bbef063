"""What stages have in common: how a model is trained, and how it is held in memory."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.fields import AUTO, SPAN, Fraction, Model, Name, NonNegative, Positive, Rate, Span


def _cadence(raw: object) -> object:
    if isinstance(raw, int) and not isinstance(raw, bool) and 1 <= raw < 2**31:
        return raw
    if raw == "auto" or (isinstance(raw, str) and re.fullmatch(SPAN, raw)):
        return raw
    raise ValueError("must be a number of steps, a time such as 10 min, or auto")


def _or_auto(**schema: object) -> WithJsonSchema:
    """What a person may write of a field for which a number is chosen where they write auto."""
    return WithJsonSchema({"anyOf": [schema, {"const": AUTO}]})


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

    micro_batch: Annotated[Positive, _or_auto(type="integer", minimum=1)] = Field(
        default=4,
        description="Samples of the greatest length that one forward and backward pass on one GPU has memory for. Shorter ones are laid end to end without padding, so that a pass holds more of them. auto chooses the fastest that fits, by the estimates of `hpc-rlhf plan`, and needs slurm.gpu and global_batch.",
    )
    zero: Annotated[Literal[0, 1, 2, 3], _or_auto(enum=[0, 1, 2, 3])] = Field(
        default=0,
        description="DeepSpeed's ZeRO stage: what is sharded over the ranks. 0 nothing, 1 optimizer, 2 and gradients, 3 and weights. Higher needs less memory and more traffic. auto chooses the fastest that fits, and needs slurm.gpu.",
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
    tensor_parallel: Positive = Field(
        default=1,
        description="Neighbouring ranks of a node that share every layer of a model (DeepSpeed's AutoTP) and work on the same samples. For a model that does not fit a GPU on a node whose GPUs are linked fast: a layer's parts are never gathered, as ZeRO-3 has to, but all ranks of a group wait for each other twice a layer. Fewer ranks then have samples of their own. Needs zero: 0, 1 or 2, and heads that it divides. Embeddings, head and an evaluation's models stay whole.",
    )
    optimizer: Literal["adamw", "onebit-adam"] = Field(
        default="adamw",
        description="onebit-adam sends about a thirtieth of AdamW's bytes between ranks (arXiv 2102.02888), for nodes on a slow network; it takes 4 more bytes of memory a weight, and zero: 0.",
    )
    onebit_warmup: Positive = Field(
        default=100,
        description="Steps that onebit-adam is AdamW before it freezes the variance: past the learning rate's warm-up, and about a seventh of all.",
    )
    offload: Literal["auto"] | None = Field(
        default=None,
        description="auto chooses offload_optimizer, offload_params and offload_frozen: what is fastest of all that fits. Needs slurm.gpu; leave those three out. A run keeps what was chosen for it.",
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
    checkpoint_every: Annotated[int | str, BeforeValidator(_cadence)] = Field(
        default="auto",
        description="How often to save: a number of steps, a time such as 10 min, or auto: as often as loses the least time at the mttf, by what a checkpoint is measured to cost (Young and Daly: the root of 2 * cost * mttf). One is also written whenever the stage is told to stop.",
    )
    mttf: Span = Field(
        default="24 h",
        description="Mean time between ends that nobody announces: a node or a process dies, for checkpoint_every: auto. Preemptions and time limits are announced, so a day suits a few nodes; give a few hours for hundreds of GPUs or an unreliable cluster.",
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, description="Checkpoints kept.")

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.optimizer == "onebit-adam" and self.zero != 0:
            raise ValueError(
                "onebit-adam needs zero: 0, because every rank compresses the momentum of all weights, and "
                "ZeRO leaves it only a share of them"
            )
        if self.tensor_parallel > 1 and self.zero == 3:
            raise ValueError(
                "tensor_parallel needs zero: 0, 1 or 2, because ZeRO-3 shards the same layers; use one of them"
            )
        if self.tensor_parallel > 1 and self.optimizer == "onebit-adam":
            raise ValueError(
                "tensor_parallel needs optimizer: adamw, because onebit-adam averages momenta over all ranks, which then "
                "have different parts of the layers"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError(
                "offload_optimizer needs zero: 1 or more, because it is ZeRO's share of the optimizer that is moved"
            )


class ReferredSpec(TrainingSpec):
    """What stages have in common that hold the model in training against frozen ones."""

    offload_frozen: bool = Field(
        default=False,
        description="Keep the weights of frozen models, the reference and the reward model, in CPU memory, sharded over the ranks, and bring them to the GPU layer by layer. They are asked but once for each answer; their memory goes to larger micro-batches.",
    )

    def check_strategy(self) -> None:
        super().check_strategy()
        if self.tensor_parallel > 1 and self.offload_frozen:
            raise ValueError(
                "offload_frozen needs tensor_parallel: 1, because it shards the frozen models by ZeRO-3; tensor_parallel "
                "takes from their memory, too"
            )

    @property
    def of_frozen(self) -> StageSpec:
        """This spec as the frozen counterpart of the model in training takes it."""
        offload = {"zero": 3, "offload_params": True} if self.offload_frozen else {}
        return self.model_copy(update={"offload_optimizer": False, **offload})
