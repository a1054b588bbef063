"""A source of training data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hpc_rlhf.spec.fields import FreeText, Model, PathText, Rate

_PAIR = ("chosen", "rejected", "margin")
# The cells that each format reads.
CELLS = {
    "prompt-chosen-rejected": ("prompt", *_PAIR, "completion", "response", "system", "label"),
    "hh": (*_PAIR, "label"),
    "messages": ("messages", "conversations", "prompt", *_PAIR, "completion", "system", "label"),
    "instruction": ("instruction", "input", "output", "history", "system"),
    "text": ("text",),
}


class SourceSpec(Model):
    """One source of training data."""

    path: PathText | None = None
    """A dataset id on the hub, or a local file or folder (json, jsonl, csv, parquet or arrow, optionally compressed).
    Write a folder as a path, such as ./my-data. It is read as datasets.load_dataset reads it: see split and subset."""
    demo: Annotated[int, Field(ge=10, le=1_000_000)] | None = None
    """Generate this many short dialogues, instead of reading a path."""
    format: Literal["prompt-chosen-rejected", "hh", "messages", "instruction", "text"] | None = None
    """Format of the rows. prompt-chosen-rejected: columns prompt, chosen (or completion, or response) and optionally
    rejected and system; without prompt, chosen and rejected begin with it. hh: chosen and rejected are whole
    transcripts of Human/Assistant turns. messages: a list of {role, content} or {from, value} in messages or
    conversations, or the last turns in chosen and rejected (or completion) with the turns before them in prompt;
    optionally system. instruction: instruction, output, and optionally input, history and system. text: a column of
    plain text. Rows of a prompt alone are for stages that need only prompts. A single response whose label is false is
    left out, except in the format instruction."""
    columns: dict[str, FreeText] = Field(default_factory=dict)
    """Names of columns that differ from those of the format, such as {prompt: question, chosen: best_answer}. A pair
    may also have a margin. Rewards get all columns that the format does not read, under the names here if they have
    one: {prompt: question, answer: ground_truth}. A column may have two names, one for each use."""
    weight: Rate = 1.0
    """How often each row is used per epoch: 0.5 uses half of the rows, 2 uses each row twice."""
    split: FreeText = "train"
    """Which split of a hub dataset or a folder to read. A folder's files belong to the split in their names
    (train.jsonl, test/a.jsonl, data/validation-00000-of-00001.parquet), or to train if no name has one."""
    subset: FreeText | None = None
    """Which configuration of a hub dataset or a folder to read. A folder's README.md lists its configurations;
    otherwise they are its subfolders."""

    def __hash__(self) -> int:  # pydantic's fails for a mapping
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSpec:
        if (self.path is None) == (self.demo is None):
            raise ValueError("give exactly one of path and demo")
        if self.path is not None and self.format is None:
            raise ValueError("a source with a path needs a format")
        if self.columns and self.path is None:
            raise ValueError("the demo's columns have no other names")
        return self

    @property
    def further(self) -> list[str]:
        """The names in ``columns`` that the format does not read."""
        return sorted(set(self.columns) - set(CELLS[self.format] if self.format else ()))

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without fields that change nothing, so that older runs keep the hash of their tokenized data."""
        fields: dict[str, Any] = dump(self)
        return fields if self.columns else {name: field for name, field in fields.items() if name != "columns"}
