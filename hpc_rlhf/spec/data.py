"""What a run trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from hpc_rlhf.spec.fields import Model, NonNegative, Positive
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import STAGE_KINDS, Data


class _Split(Model):
    """Relative shares of the prompts that each stage trains on; no prompt is in two stages."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


if TYPE_CHECKING:
    SplitSpec = _Split
else:
    SplitSpec = create_model(
        "SplitSpec",
        __base__=_Split,
        __doc__=_Split.__doc__,
        __module__=__name__,
        **{
            kind.name: (
                NonNegative,
                Field(default=kind.share, description=f"Share of the {kind.name} stage."),
            )
            for kind in STAGE_KINDS
            if kind.data is not Data.NONE
        },
    )


class DataSpec(Model):
    """The training data of all stages."""

    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)] = Field(
        description="Sources, blended by weight."
    )
    split: SplitSpec = Field(default=SplitSpec(), description="How prompts are shared out among the stages.")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.05, description="Fraction of each stage's prompts kept for evaluation."
    )
    template: Literal["auto", "plain"] = Field(
        default="auto",
        description="How dialogues are written. auto: by the chat template of the actor's tokenizer, which a model that "
        "chats already expects, and without thoughts; where it has none, as plain turns of Human: and Assistant:. plain: always as plain turns, "
        "as DeepSpeed-Chat does.",
    )
    max_prompt_tokens: Positive = Field(
        default=256,
        description="Longest prompt; longer ones are left out of PPO and cut at the left elsewhere.",
    )
    max_answer_tokens: Positive = Field(
        default=256, description="Longest answer, given or generated; longer given ones are cut at the right."
    )
