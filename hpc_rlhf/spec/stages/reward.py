"""The reward model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import ACCURACY, MARGIN, TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import TrainingSpec


class RewardSpec(TrainingSpec):
    """The reward model, trained on pairs of a chosen and a rejected response. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")
    loss: Literal["token", "last"] = "token"
    """Where the scores of a pair are compared. token: at each token from the first one that differs (DeepSpeed-Chat).
    last: only at the last token, where PPO and the evaluation read a score (InstructGPT, arXiv 2203.02155)."""
    margins: bool = False
    """Subtract each pair's margin from the difference of its scores before they are compared (Llama 2, arXiv
    2307.09288, equation 2): a number in the column margin of every pair, which data.sources[].columns may call
    otherwise. Needs loss: last."""
    center_scores: bool = True
    """Shift the finished model's scores so that held-out chosen responses have mean 0, as InstructGPT does before PPO
    (arXiv 2203.02155, section 3.5): pairs do not determine where 0 is, but score_clip is around it. Without
    held-out data there is no shift. config.json keeps it as score_offset, for others to subtract from the head's
    output."""

    before: ClassVar[dict[str, object]] = {**TrainingSpec.before, "center_scores": False}

    @model_validator(mode="after")
    def _check_margins(self) -> RewardSpec:
        if self.margins and self.loss != "last":
            raise ValueError("margins needs loss: last, because a margin is one of whole responses")
        return self


REWARD = StageKind(
    name="reward",
    title="Reward model",
    spec=RewardSpec,
    description="Reward model.",
    summary="The reward model learns from pairs which response is better. Runs in parallel with SFT.",
    inputs=("pretrain",),
    data=Data.PAIRS,
    models=("actor", "reward"),
    makes="reward model",
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    held_out=("accuracy", "loss", "margin"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(Plot("loss", "nats per pair", {"loss": "loss"}, held_out="loss"), ACCURACY, MARGIN, *TRAINING),
)
