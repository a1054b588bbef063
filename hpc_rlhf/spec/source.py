"""A source of training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import FreeText, Model, PathText, Rate


class SourceSpec(Model):
    """One source of training data."""

    path: PathText | None = None
    """A dataset id on the hub, or a local file or folder (json, jsonl, csv, parquet or arrow, optionally compressed). A
    folder is read as datasets.load_dataset reads it: see split and subset."""
    demo: Annotated[int, Field(ge=10, le=1_000_000)] | None = None
    """Generate this many short dialogues, instead of reading a path."""
    format: Literal["prompt-chosen-rejected", "hh", "messages", "instruction", "text"] | None = None
    """Format of the rows. prompt-chosen-rejected: columns prompt, chosen (or completion, or response) and optionally
    rejected and system. hh: chosen and rejected are whole transcripts of Human/Assistant turns. messages: a list of
    {role, content} or {from, value} in messages or conversations, or the last turns in chosen and rejected (or
    completion) with the turns before them in prompt; optionally system. instruction: instruction, output, and
    optionally input, history and system. text: a column of plain text."""
    weight: Rate = 1.0
    """How often each row is used per epoch: 0.5 uses half of the rows, 2 uses each row twice."""
    split: FreeText = "train"
    """Which split of a hub dataset or a folder to read. A folder's files belong to the split in their names
    (train.jsonl, test/a.jsonl, data/validation-00000-of-00001.parquet), or to train if no name has one."""
    subset: FreeText | None = None
    """Which configuration of a hub dataset or a folder to read. A folder's README.md lists its configurations;
    otherwise they are its subfolders."""

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSpec:
        if (self.path is None) == (self.demo is None):
            raise ValueError("give exactly one of path and demo")
        if self.path is not None and self.format is None:
            raise ValueError("a source with a path needs a format")
        return self
