"""DPO."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import PreferenceSpec


class DpoSpec(PreferenceSpec):
    """Direct preference optimization (arXiv 2305.18290) without a reward model. A sample is a pair."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Fraction of the pairs assumed to be labeled the wrong way round; above 0 for noisy preferences."""


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
