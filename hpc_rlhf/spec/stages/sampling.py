"""Fields of stages that sample from a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

TopP = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Sample from the smallest set of tokens with this total probability; 1 samples from all tokens.",
    ),
]
TopK = Annotated[int, Field(ge=0, description="Sample from the k most likely tokens; 0 samples from all tokens.")]
