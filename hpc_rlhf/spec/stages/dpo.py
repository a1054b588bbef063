"""DPO."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import ReferredSpec, StageSpec


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


DPO = StageKind(
    name="dpo",
    title="DPO",
    spec=DpoSpec,
    description="DPO: learn from pairs without a reward model and without sampling. Less memory and time than PPO, and nothing to tune but lr and beta; PPO goes further where the reward model is good.",
    inputs=("sft",),
    data=Data.PAIRS,
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(
        Plot("loss", "nats a pair", {"loss": "loss"}),
        ACCURACY,
        MARGIN,
        Plot("implicit rewards", "nats", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
        *TRAINING,
    ),
)
