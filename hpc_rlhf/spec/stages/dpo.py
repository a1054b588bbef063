"""DPO."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import ReferredSpec, StageSpec, Warmup


class DpoSpec(ReferredSpec):
    """Direct preference optimization (arXiv 2305.18290) without a reward model. A sample is a pair.

    It starts from the SFT model, if there is one, which is also the reference. With lora.only the reference
    is the model with its adapters disabled, so no second model takes memory.
    """

    lr: Rate = 1.0e-6
    """Peak learning rate. Much lower than for fine-tuning: at a higher one, both responses soon become unlikely."""
    warmup: Warmup = 0.1
    """Steps over which the learning rate rises from 0: a fraction of all optimizer steps, or from 1 on their number. It
    ends with the stage at the latest. 0.1 is that of Tülu 3's DPO (arXiv 2411.15124)."""
    beta: Rate = 0.1
    """Strength of the pull toward the reference: a higher value keeps the model closer to it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Fraction of the pairs assumed to be labeled the wrong way round; above 0 for noisy preferences."""

    @property
    def strategies(self) -> dict[str, StageSpec]:
        return {"": self, "ref": self.of_frozen}


DPO = StageKind(
    name="dpo",
    title="DPO",
    spec=DpoSpec,
    description="DPO: learn from pairs without a reward model and without sampling. It takes less memory "
    "and time than PPO, and only lr and beta need tuning; PPO can achieve more with a good reward model.",
    inputs=("pretrain", "sft"),
    data=Data.PAIRS,
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    held_out=("accuracy", "loss", "margin"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(
        Plot("loss", "nats per pair", {"loss": "loss"}, held_out="loss"),
        ACCURACY,
        MARGIN,
        Plot("implicit rewards", "nats", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
        *TRAINING,
    ),
)
