"""A stage's rewards: what scores its responses, and what happens if that fails."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hpc_rlhf.spec.fields import Command, Duration, FreeText, Model, PathText, seconds


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


def _function(text: str) -> str:
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError("must be a file and a function in it, such as rewards.py:score")
    return text


Column = Annotated[FreeText, Field(min_length=1)]


class RewardItem(Model):
    """A reward. Exactly one of model, function, math, exact, format, code, url and reasoning_gym says what it is."""

    model: PathText | None = None
    """reward: the model of the reward stage, or of models.reward. Otherwise a hub id or a folder of any
    sequence-classification model with one label; if its tokenizer differs from the actor's, it reads the text."""
    function: Annotated[PathText, AfterValidator(_function)] | None = None
    """A Python file and a function in it, such as rewards.py:score. It is called as TRL calls reward functions: with
    prompts, completions and the columns of the data as keyword arguments, each a list. It returns a list of numbers,
    with None where it does not apply. The run keeps a copy of the file."""
    math: Column | None = None
    """A column with the right answer, a number or a formula. The score is 1 if the last number or formula in the
    response equals it (math-verify), otherwise 0."""
    exact: Column | None = None
    """A column with the right answer as text. The score is 1 if the response, or what format finds in it, is this text,
    apart from space around it; otherwise 0."""
    format: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_pattern)] | None = None
    """A regular expression, whose . also matches line ends. The score is 1 if the whole response matches, otherwise 0.
    Next to math, exact, code or reasoning_gym, it instead selects what they judge: the first group of its last
    match."""
    code: Column | None = None
    """A column with a test, Python code that runs after the response's last block of code, or with a list of such
    tests. The reward is the share that passes. Needs an image to run them in."""
    image: PathText | None = None
    """An Apptainer image with python3, in which code runs without network and without files of this system."""
    memory: Annotated[str, Field(pattern=r"^[0-9]{1,6}[MG]$")] = "512M"
    """Memory limit for a response's program, with code."""
    url: Annotated[Command, Field(pattern=r"^https?://")] | None = None
    """A server that scores batches of responses; see docs/rewards.md for the request and the response."""
    secret: Annotated[FreeText, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable whose value is sent to url as a bearer token. The value is never stored."""
    reasoning_gym: Literal[True] | None = None
    """Use the scorer of the row's reasoning_gym task, from 0 to 1. It reads the last text between <answer> and
    </answer>, or the whole response if there is none. Rows of other sources get no score."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight of the reward in the sum. 0 only reports it."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    """Its name in metrics; by default, its kind, with a number if there are several of the kind."""
    timeout: Duration | None = None
    """How long one call may take: for a batch with function and url, for a response with the others. A response whose
    check or program takes longer scores 0; a function or server counts as failed. By default 5 s for math and
    reasoning_gym, otherwise 30 s."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens if the reward fails: it raises, hangs, or returns too few or too many values or one that is not
    finite. stop ends the stage, and the error names the response; skip leaves the response out of training, and metrics
    count it."""

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        fields = [name for name in KINDS if getattr(self, name) is not None]
        return next(name for name in fields if name != "format" or len(fields) == 1)

    @property
    def asks_run_model(self) -> bool:
        """Whether it is the run's reward model."""
        return self.model == "reward"

    @property
    def own_model(self) -> str | None:
        """The hub id or folder of a reward model other than the run's."""
        return None if self.asks_run_model else self.model

    @property
    def limit(self) -> float:
        """How long one call may take, in seconds."""
        if self.timeout is not None:
            return seconds(self.timeout)
        return 5.0 if self.kind in ("math", "reasoning_gym") else 30.0

    @property
    def memory_bytes(self) -> int:
        """The memory limit of a program, in bytes."""
        return int(self.memory[:-1]) << {"M": 20, "G": 30}[self.memory[-1]]

    @model_validator(mode="after")
    def _one_kind(self) -> RewardItem:
        fields = [name for name in KINDS if getattr(self, name) is not None]
        kinds = [name for name in fields if name != "format"] or fields
        if len(kinds) != 1:
            several = f"; it has {' and '.join(kinds)}" if kinds else ""
            raise ValueError(f"give exactly one of {', '.join(KINDS)}{several}")
        if "format" in fields and kinds[0] not in ("format", "math", "exact", "code", "reasoning_gym"):
            raise ValueError(f"format cannot select what {kinds[0]} judges")
        for field, kind in (("image", "code"), ("secret", "url")):
            if getattr(self, field) is not None and kinds[0] != kind:
                raise ValueError(f"{field} is for {kind}")
        if kinds[0] == "code" and self.image is None:
            raise ValueError("code needs an image, because responses may hold any program")
        return self


KINDS = ("model", "function", "math", "exact", "format", "code", "url", "reasoning_gym")


def names(rewards: Sequence[RewardItem]) -> list[str]:
    """What metrics call each of a stage's rewards: its name, or its kind, with a number if there are several."""
    kinds = Counter(item.kind for item in rewards if item.name is None)
    numbers: Counter[str] = Counter()
    result = []
    for item in rewards:
        numbers[item.kind] += item.name is None
        result.append(item.name or (f"{item.kind}-{numbers[item.kind]}" if kinds[item.kind] > 1 else item.kind))
    return result


def _distinct(rewards: tuple[RewardItem, ...]) -> tuple[RewardItem, ...]:
    (name, count), *_ = Counter(names(rewards)).most_common(1)
    if count > 1:
        raise ValueError(f"{count} rewards have the name {name}")
    return rewards


Rewards = Annotated[tuple[RewardItem, ...], Field(min_length=1), AfterValidator(_distinct)]
