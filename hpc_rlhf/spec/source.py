"""A source of training data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hpc_rlhf.spec.fields import FreeText, Model, PathText, Rate

_PAIR = ("chosen", "rejected", "margin")
# The cells that each format reads.
CELLS = {
    "prompt-chosen-rejected": ("prompt", *_PAIR, "completion", "response", "system", "label"),
    "hh": (*_PAIR, "label"),
    "messages": ("messages", "conversations", "prompt", *_PAIR, "completion", "system", "label"),
    "instruction": ("instruction", "input", "output", "history", "system"),
    "text": ("text",),
    "prompt": ("prompt", "system"),
    "vote": ("messages", "responses", "vote"),
    "thumb": ("messages", "responses", "vote"),
}
# Sums of two numbers from 10 to 99.
ARITHMETIC_PROBLEMS = 90 * 90
_ORIGINS = ("path", "demo", "arithmetic", "reasoning_gym", "feedback")
_Text = Annotated[str, Field(min_length=1, max_length=2**20)]
_Option = int | float | bool | str


def _gym(options: dict[str, Any]) -> dict[str, Any]:
    size = options.get("size")
    if not isinstance(options.get("task"), str) or type(size) is not int or not 10 <= size <= 10_000_000:
        raise ValueError("needs task, such as chain_sum, and size, from 10 to 10,000,000")
    return options


class SourceSpec(Model):
    """One source of training data."""

    path: PathText | None = None
    """A dataset id on the hub, or a local file or folder (json, jsonl, csv, parquet, arrow or txt, optionally
    compressed). Write a folder as a path, such as ./my-data. It is read as datasets.load_dataset reads it: see split
    and subset. A .txt file is a row with the column text; a longer one is a row for each MiB."""
    feedback: PathText | None = None
    """A run directory. People voted on the run's models on the page of hpc-rlhf serve. Needs kind."""
    kind: Literal["pairs", "thumbs"] | None = None
    """Which votes of feedback become rows. pairs: comparisons of two responses, of which one was better; the stages get
    it as chosen and the other as rejected. thumbs: single responses with a thumb up or down, for KTO; other stages get
    those with a thumb up."""
    demo: Annotated[int, Field(ge=10, le=1_000_000)] | None = None
    """Generate this many short dialogues, instead of reading a path."""
    arithmetic: Annotated[int, Field(ge=10, le=ARITHMETIC_PROBLEMS)] | None = None
    """Generate this many different sums of two-digit numbers, such as 37+45=?, with the result in the column answer. A
    third of the responses add digit by digit (7+5=12, 3+4+1=8: 82), and the others estimate (about 80)."""
    reasoning_gym: Annotated[dict[str, _Option | tuple[_Option, ...]], AfterValidator(_gym)] | None = None
    """Generate prompts of a task of reasoning-gym: {task: chain_sum, size: 5000, max_terms: 4}. Fields other than task
    and size are options of the task; its seed follows from the run's. Rewards get the columns answer and
    reasoning_gym, the whole entry with its metadata."""
    format: Literal["prompt-chosen-rejected", "hh", "messages", "instruction", "text", "prompt"] | None = None
    """Format of the rows. prompt-chosen-rejected: columns prompt, chosen (or completion, or response) and optionally
    rejected and system; without prompt, chosen and rejected begin with it. hh: chosen and rejected are whole
    transcripts of Human/Assistant turns. messages: a list of {role, content} or {from, value} in messages or
    conversations, or the last turns in chosen and rejected (or completion) with the turns before them in prompt;
    optionally system. instruction: instruction, output, and optionally input, history and system. text: a column of
    plain text. prompt: a prompt, as text or a list of messages, and optionally system. Rows of a prompt alone are for
    stages that need only prompts. A single response whose label is false is for KTO only; the format instruction has
    no label."""
    system: _Text | None = None
    """The system prompt of dialogues that have none of their own."""
    few_shot: _Text | None = None
    """Text before the first turn of the user, such as solved examples. An empty line follows it."""
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
        if sum(getattr(self, origin) is not None for origin in _ORIGINS) != 1:
            raise ValueError(f"give exactly one of {', '.join(_ORIGINS[:-1])} and {_ORIGINS[-1]}")
        if self.path is not None and self.format is None:
            raise ValueError("a source with a path needs a format")
        if (self.feedback is None) != (self.kind is None):
            raise ValueError("feedback and kind belong together: {feedback: RUN, kind: pairs}")
        if self.feedback is not None and self.format is not None:
            raise ValueError("feedback has a format of its own: leave out format")
        if self.columns and self.path is None:
            raise ValueError("only a source with a path can have other names for its columns")
        if self.format == "text" and (self.system or self.few_shot):
            raise ValueError("plain text has no system prompt and no examples")
        return self

    @property
    def generated(self) -> int | None:
        """How many rows are generated; None if the source has a path."""
        return self.reasoning_gym["size"] if self.reasoning_gym else self.demo or self.arithmetic  # type: ignore[return-value]

    @property
    def row_format(self) -> str:
        """The format of its rows, read or generated."""
        if self.feedback:
            return "vote" if self.kind == "pairs" else "thumb"
        own = "prompt" if self.reasoning_gym else "prompt-chosen-rejected"
        return self.format or own

    @property
    def name(self) -> str:
        """Its name in messages."""
        gym = f"reasoning_gym {self.reasoning_gym['task']}" if self.reasoning_gym else None
        votes = f"feedback {self.feedback}" if self.feedback else None
        return self.path or gym or votes or ("demo" if self.demo else "arithmetic")

    @property
    def further(self) -> list[str]:
        """The names in ``columns`` that the format does not read."""
        return sorted(set(self.columns) - set(CELLS[self.format] if self.format else ()))

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without fields that change nothing, so that older runs keep the hash of their tokenized data."""
        fields: dict[str, Any] = dump(self)
        return {name: field for name, field in fields.items() if name not in _LATER or field}


_LATER = ("feedback", "kind", "arithmetic", "reasoning_gym", "system", "few_shot", "columns")
