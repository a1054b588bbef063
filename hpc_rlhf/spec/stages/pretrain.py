"""Pretraining on plain text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Fraction, Model, NonNegative, Positive, Rate
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages.kind import GRADIENT, LEARNING_RATE, SENT, Data, Plot, StageKind
from hpc_rlhf.spec.training import PipelinedSpec


class FilterSpec(Model):
    """Which documents are left out, by rules that hold in any language. The report counts what each leaves out."""

    min_characters: Annotated[int, Field(ge=0)] = Field(default=0, description="Shorter documents are left out.")
    max_characters: Positive | None = Field(default=None, description="Longer documents are left out.")
    min_letters: Fraction = 0.0
    """Smallest share of letters and digits, in any script, among the characters that are not spaces. Prose has more
    than 0.9, program code about 0.8."""
    max_repeated: Fraction = 1.0
    """Largest share of characters in lines that the document already had; 0.2 in Gopher (arXiv 2112.11446, table A1).
    """
    max_compression: Rate | None = None
    """How many times smaller zlib may make a document. Prose is between 2 and 3; from about 8 on, a text mostly repeats
    itself."""


class PretrainSpec(PipelinedSpec):
    """Next-token training on plain text, of a new model or of a pretrained one. A sample is a sequence of
    sequence_length tokens, all of which are learned."""

    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    """Sources of plain text (format: text), blended by weight. A sequence comes from one source, and every part of
    training has sequences of each source in exact proportion: weight times what the source has, relative to the
    others. A .txt file is one document, or one per MiB if it is longer; in other files each row is one."""
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] = 2048
    """Tokens of a sequence. Documents follow each other, each with BOS, if there is one, and EOS, and are cut to
    sequences of this length."""
    cross_documents: bool = False
    """Let tokens attend to earlier documents of their sequence, too. false keeps attention, and positions, within a
    document."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """Fraction of each source's documents that are held out for evaluation. Equal documents are held out together."""
    deduplicate: bool = False
    """Leave out documents that are equal to an earlier one, of any source; sources come in their order here. All text
    is read once more."""
    max_line_documents: Positive | None = None
    """Leave out lines that more than this many documents have, of any source, such as menus and notices: from all of
    them, as CCNet does with 1 (arXiv 1911.00359), and Llama 3 with 6 in 30 million documents (arXiv 2407.21783). Lines
    are compared without the spaces around them, and empty ones stay. Documents that deduplicate leaves out do not
    count. All text is read once more. Not for program code, whose short lines repeat."""
    filters: FilterSpec = FilterSpec()
    """Documents to leave out for their length or quality."""
    lr: Rate = Field(default=3.0e-4, description="Peak learning rate.")
    weight_decay: NonNegative = Field(default=0.1, description="AdamW's weight decay, on matrices only.")

    @property
    def compares_sources(self) -> bool:
        """Whether what is left out of a source depends on the others."""
        return self.deduplicate or self.max_line_documents is not None

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
