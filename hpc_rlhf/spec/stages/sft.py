"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hpc_rlhf.spec.fields import Rate
from hpc_rlhf.spec.stages.kind import TRAINING, Plot, StageKind
from hpc_rlhf.spec.training import PipelinedSpec, TrainingSpec


class SftSpec(PipelinedSpec):
    """Supervised fine-tuning on prompts and chosen responses."""

    lr: Rate = Field(default=9.65e-6, description="Peak learning rate.")
    answer_only: bool = True
    """Train only on the responses of dialogues, not on their prompts; of texts without a prompt on everything. false
    also trains on prompts; in plain transcripts, an end of sequence then follows every response in them, so that the
    model does not learn to write the human's turns."""

    before: ClassVar[dict[str, object]] = {**TrainingSpec.before, "answer_only": False}


SFT = StageKind(
    name="sft",
    title="SFT",
    spec=SftSpec,
    description="Supervised fine-tuning.",
    summary="Supervised fine-tuning of the actor on the chosen responses.",
    inputs=("pretrain",),
    share=2,
    ranking=("perplexity", "loss"),
    held_out=("perplexity", "loss"),
    result="held-out perplexity {perplexity_before} → {perplexity_after}",
    plots=(
        Plot("loss", "nats per token", {"loss": "loss"}, held_out="loss"),
        Plot("perplexity of responses", "per token", {}, held_out="perplexity", log=True),
        *TRAINING,
    ),
)
