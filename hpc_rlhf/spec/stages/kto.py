"""KTO."""

from __future__ import annotations

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import ReferredSpec, StageSpec, Warmup


class KtoSpec(ReferredSpec):
    """Kahneman-Tversky optimization (arXiv 2402.01306): learn which single responses are good. A sample is a response.

    It starts from the SFT model, if there is one, which is also the reference. With lora.only the reference
    is the model with its adapters disabled, so no second model takes memory.
    """

    lr: Rate = 1.0e-6
    """Peak learning rate. The paper recommends 5e-7 to 5e-6."""
    warmup: Warmup = 0.1
    """Steps over which the learning rate rises from 0: a fraction of all optimizer steps, or from 1 on their number. It
    ends with the stage at the latest."""
    beta: Rate = 0.1
    """Strength of the pull toward the reference: a higher value keeps the model closer to it."""
    desirable_weight: Rate = 1.0
    """Weight of the losses of good responses. The paper recommends that good responses, by their number and weight,
    count between 1 and 4/3 as much as bad ones."""
    undesirable_weight: Rate = 1.0
    """Weight of the losses of bad responses."""

    @property
    def strategies(self) -> dict[str, StageSpec]:
        return {"": self, "ref": self.of_frozen}


KTO = StageKind(
    name="kto",
    title="KTO",
    spec=KtoSpec,
    description="KTO: learn from single responses that are labeled good or bad, such as thumbs up and down, without a "
    "reward model and without sampling. Both responses of a pair count as well.",
    inputs=("pretrain", "sft"),
    data=Data.LABELED,
    progress=("loss", "accuracy"),
    ranking=("accuracy", "loss"),
    held_out=("accuracy", "loss", "margin"),
    result="held-out accuracy {accuracy:.3f}",
    plots=(
        Plot("loss", "per response", {"loss": "loss"}, held_out="loss"),
        Plot("accuracy", "fraction of responses", {"accuracy": "training"}, held_out="accuracy"),
        Plot("margin", "reward, on the side of the label", {"margin": "margin"}, held_out="margin"),
        Plot("KL divergence", "nats per response", {"kl": "from the reference"}),
        *TRAINING,
    ),
)
