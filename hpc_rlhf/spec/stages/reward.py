"""The reward model."""

from __future__ import annotations

from pydantic import Field

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import TrainingSpec


class RewardSpec(TrainingSpec):
    """The reward model, trained on pairs of a chosen and a rejected response. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")


REWARD = StageKind(
    name="reward",
    title="Reward model",
    spec=RewardSpec,
    description="Reward model.",
    summary="The reward model learns from pairs which response is better. Runs in parallel with SFT.",
    data=Data.PAIRS,
    models=("actor", "reward"),
    makes="reward model",
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(Plot("loss", "nats per pair", {"loss": "loss"}), ACCURACY, MARGIN, *TRAINING),
)
