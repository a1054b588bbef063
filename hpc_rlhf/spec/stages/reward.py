"""The reward model."""

from __future__ import annotations

from pydantic import Field

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import TrainingSpec


class RewardSpec(TrainingSpec):
    """The reward model, trained on pairs of a chosen and a rejected answer. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")


REWARD = StageKind(
    name="reward",
    title="Reward model",
    spec=RewardSpec,
    description="Reward model.",
    summary="The reward model learns from pairs which answer is better. Runs beside SFT: it needs nothing from it.",
    data=Data.PAIRS,
    models=("actor", "reward"),
    makes="reward model",
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(Plot("loss", "nats a pair", {"loss": "loss"}), ACCURACY, MARGIN, *TRAINING),
)
