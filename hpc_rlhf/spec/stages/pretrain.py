"""Pretraining on plain text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import NonNegative, Rate
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages.kind import GRADIENT, LEARNING_RATE, SENT, Data, Plot, StageKind
from hpc_rlhf.spec.training import TrainingSpec


class PretrainSpec(TrainingSpec):
    """Next-token training on plain text, of a new model or of a pretrained one. A sample is a sequence of
    sequence_length tokens, all of which are learned."""

    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    """Sources of plain text (format: text), blended by weight. A sequence comes from one source, and every part of
    training has sequences of each source in exact proportion: weight times what the source has, relative to the
    others. A .txt file, or each MiB of a longer one, is a document; in other files each row is one."""
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] = 2048
    """Tokens of a sequence. Documents follow each other, each with BOS, if there is one, and EOS, and are cut to
    sequences of this length."""
    cross_documents: bool = False
    """Let tokens attend to earlier documents of their sequence, too. false keeps attention, and positions, within a
    document."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """Fraction of each source's documents that are held out for evaluation. Equal documents are held out together."""
    lr: Rate = Field(default=3.0e-4, description="Peak learning rate.")
    weight_decay: NonNegative = Field(default=0.1, description="AdamW's weight decay, on matrices only.")

    @model_validator(mode="after")
    def _check_text(self) -> PretrainSpec:
        if wrong := next((each for each in self.sources if each.path and each.format != "text"), None):
            raise ValueError(f"pretraining reads plain text, so the source {wrong.name} needs format: text")
        return self


PRETRAIN = StageKind(
    name="pretrain",
    title="Pretraining",
    spec=PretrainSpec,
    description="Pretraining on plain text.",
    summary="Next-token training on plain text.",
    data=Data.DOCUMENTS,
    sources=("sources",),
    makes="base model",
    ranking=("perplexity", "loss"),
    held_out=("perplexity", "loss"),
    result="held-out perplexity {perplexity_before} → {perplexity_after}",
    plots=(
        Plot("loss", "nats per token", {"loss": "loss"}, held_out="loss"),
        Plot("perplexity", "per token", {}, held_out="perplexity", log=True),
        LEARNING_RATE,
        GRADIENT,
        Plot("throughput", "tokens per second", {"tokens_per_second": "tokens"}),
        Plot("MFU", "share of the GPUs' peak", {"mfu": "MFU"}),
        SENT,
    ),
)
