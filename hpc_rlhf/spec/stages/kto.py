"""KTO."""

from __future__ import annotations

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import TRAINING, Data, Plot, StageKind
from hpc_rlhf.spec.training import PreferenceSpec


class KtoSpec(PreferenceSpec):
    """Kahneman-Tversky optimization (arXiv 2402.01306): learn which responses are good. A sample is a response."""

    desirable_weight: Rate = 1.0
    """Weight of the losses of good responses. The paper recommends that good responses, by their number and weight,
    count between 1 and 4/3 as much as bad ones."""
    undesirable_weight: Rate = 1.0
    """Weight of the losses of bad responses."""


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
