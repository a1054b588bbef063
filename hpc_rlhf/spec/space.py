"""The fields of a sweep: lists and ranges of values, and how to search among them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from hpc_rlhf.spec.fields import Model

MAX_RUNS = 200  # each is a folder and several queued jobs
_DIGITS = 3  # a value from a range is rounded to a thousandth of it, or of itself

Number = int | Annotated[float, Field(allow_inf_nan=False)]


class RangeSpec(Model):
    """A range of numbers from which the trials of a search take their values. They are whole numbers if low, high and
    step are."""

    low: Number = Field(description="The lowest value.")
    high: Number = Field(description="The highest value.")
    log: bool = False
    """Search on a logarithmic scale, as for learning rates."""
    step: Number | None = Field(default=None, description="Distance between the values; null takes any.")

    @model_validator(mode="after")
    def _check(self) -> RangeSpec:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError("log needs a low above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step do not combine")
        if self.step is not None and (self.step <= 0 or not math.isclose(self.steps, round(self.steps))):
            raise ValueError("step must divide the distance from low to high")
        return self

    @property
    def steps(self) -> float:
        return (self.high - self.low) / (self.step or 1)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @property
    def size(self) -> float:
        """How many values it has; infinite for a continuous one."""
        return round(self.steps) + 1 if self.is_whole or self.step is not None else math.inf

    def at(self, index: int) -> Number:
        """One of its values, if there is a finite number of them."""
        return self.rounded(self.low + index * (self.step or 1))

    def rounded(self, value: Number) -> Number:
        """The value without the digits that make no difference."""
        if self.is_whole:
            return int(value)
        scale = self.step or self.high - self.low
        scale = min(scale, value) if self.log else scale
        return min(max(round(float(value), _DIGITS - math.floor(math.log10(scale))), self.low), self.high)

    def has(self, value: object) -> bool:
        """Whether a value lies in the range."""
        return isinstance(value, (int, float)) and self.low <= value <= self.high


class SearchSpec(Model):
    """How a sweep searches for the best values, in trials: runs whose values are chosen one after the other."""

    method: Literal["random", "grid", "tpe"]
    """tpe chooses values near the best so far, by a tree-structured Parzen estimator (Bergstra et al. 2011), after a
    quarter of the trials at random; random chooses them independently; grid takes all combinations in random order."""
    trials: Annotated[int, Field(ge=1, le=MAX_RUNS)] = Field(description="Number of trials.")
    metric: str
    """What to improve: eval.reward, eval.win_rate and so on, of the final model's evaluation; or a metric of a stage,
    such as reward.accuracy or sft.perplexity, at its end. Whether lower is better is known."""
    halving: str | None = None
    """Stop bad trials early by successive halving (arXiv 1810.05934): a metric such as ppo.reward or sft.perplexity
    that a stage measures on held-out data while it trains, every eval_every steps. After evaluations number 1, 2, 4,
    8, … a trial goes on only if it is among the better half of those that have come as far. null lets all finish."""


class SweepSpec(Model):
    """Several runs, each in its own folder in run_dir. A stage is trained once for all runs in which everything that
    affects it is the same."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[
        str,
        Annotated[
            Annotated[tuple[Any, ...], Field(min_length=1)] | RangeSpec,
            Field(description="Values to try of the field at a path such as stages.ppo.kl_coef. A range needs search."),
        ],
    ]

    search: SearchSpec | None = Field(default=None, description="Search for the best values; null tries all of them.")


Choices = tuple[Any, ...]
Space = Mapping[str, Choices | RangeSpec]


def size(axis: Choices | RangeSpec) -> float:
    """How many values a path has; infinite for a continuous range."""
    return axis.size if isinstance(axis, RangeSpec) else len(axis)


def index_of(choices: Choices, value: object) -> int | None:
    """The place of a value, as JSON has it, in a list; None if it is not there."""
    texts = list(map(json.dumps, choices))
    return texts.index(json.dumps(value)) if json.dumps(value) in texts else None


def combination(space: Space, number: int) -> dict[str, object]:
    """One of the combinations of a finite space, by its number; the last path varies fastest."""
    values: dict[str, object] = {}
    for path, axis in reversed(list(space.items())):
        number, index = divmod(number, int(size(axis)))
        values[path] = axis.at(index) if isinstance(axis, RangeSpec) else axis[index]
    return {path: values[path] for path in space}
