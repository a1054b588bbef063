"""The training data of a run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hpc_rlhf.spec.fields import Fraction, Model, NonNegative, Positive, add_fields
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import STAGE_KINDS


@add_fields(
    {
        kind.name: (NonNegative, Field(default=kind.share, description=f"Share of the {kind.name} stage."))
        for kind in STAGE_KINDS
        if kind.data.is_shared
    }
)
class SplitSpec(Model):
    """Relative shares of the conversations that the stages train on. None is used by two stages: rows whose dialogues
    begin with the same first user turn, and the same system prompt, stay together. Prompts without a response all go to
    PPO or GRPO."""


class DataSpec(Model):
    """The training data of all stages but pretraining, which has sources of its own."""

    sources: tuple[SourceSpec, ...] = Field(description="Sources, blended by weight.")
    split: SplitSpec = Field(default=SplitSpec(), description="How conversations are divided among the stages.")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Fraction of each stage's conversations held out for evaluation."""
    template: Literal["auto", "plain"] = "auto"
    """How dialogues are formatted. auto: exactly as the chat template of the actor's tokenizer writes them, with its
    prompt for thinking if a response thinks; if it has none, as plain turns of Human: and Assistant:. plain: always as
    plain turns, as in DeepSpeed-Chat."""
    max_dropped: Fraction = 1.0
    """Refuse to train if a stage loses more than this fraction of a source's rows: rows that are broken, lack what the
    stage needs, or are too long. Above 0.05 there is a warning in any case."""
    max_prompt_tokens: Positive = 256
    """Maximum length of a prompt. PPO and GRPO skip longer prompts; other stages leave out their oldest turns."""
    max_answer_tokens: Positive = 256
    """Maximum length of a response. Longer responses in the data are truncated on the right. A text without a
    prompt is split into pieces of max_prompt_tokens + max_answer_tokens."""
    version: Literal[1, 2] = 2
    """How rows become samples. A run keeps the version that it began with. 2: conversations are divided as whole ones,
    so that no held-out response is part of a prompt that is trained on. 1, of hpc-rlhf 0.1.0: only rows with the same
    whole prompt stay together, and with answer_only: false no end of sequence follows the responses in prompts."""

    # As StageSpec.before.
    before: ClassVar[dict[str, object]] = {"version": 1}
