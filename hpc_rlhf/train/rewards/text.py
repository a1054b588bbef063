"""Rewards that read text: what they take and return, and their use as a ``RewardSource``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import regex

from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.train.runtime.world import World


@dataclass(frozen=True)
class Failure:
    """Why a response has no score, although the reward applies to it.

    Attributes:
        why: a sentence without its subject, such as "raised ValueError: no answer".
        exit_code: what the stage ends with: INPUT_WRONG if another attempt would fail too, otherwise RUN_FAILED.
        of_all: all responses of the call failed together.
    """

    why: str
    exit_code: int = INPUT_WRONG
    of_all: bool = False


# None: the reward does not apply to the response.
Score = float | None | Failure


@dataclass(frozen=True)
class TextBatch:
    """Responses to score, each with its prompt, as text without special tokens.

    Attributes:
        response_ids: the tokens of the responses, special ones included.
        columns: further columns of the data, each with an entry for each response.
    """

    prompts: list[str]
    responses: list[str]
    response_ids: list[list[int]]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.responses)

    def column(self, name: str) -> Sequence[Any]:
        """A column that a reward needs.

        Raises:
            HpcRlhfError: the data has no such column.
        """
        if name not in self.columns:
            there = ", ".join(self.columns) or "no columns"
            raise HpcRlhfError(
                f"the data has no column {name!r}; the rewards get {there}",
                where="data.sources",
                hint="name one of the data's columns in the reward, or rename one by columns: of the source",
            )
        return self.columns[name]


class TextReward(Protocol):
    """Scores text; a function, a verifier, a server."""

    def judge(self, batch: TextBatch) -> list[Score]:
        """A score for each response of a batch, which may be empty. Not collective.

        Raises:
            WorkCancelled: the attempt must stop.
        """


@dataclass(frozen=True)
class FromText:
    """A ``RewardSource`` that decodes token ids for a ``TextReward``, with failures among its scores.

    Attributes:
        cancellable: wraps work that may raise WorkCancelled; see ``StopControl``.
    """

    reward: TextReward
    tokenizer: Any
    world: World
    cancellable: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[Score]:
        """A score for each response. Collective: of the ranks with the same samples, the first scores for all."""
        scores: list[Score] = []
        with self.cancellable():
            if self.world.rank in self.world.dims.sample_owners:
                batch = TextBatch(self._texts(prompts), self._texts(responses), list(map(list, responses)), columns)
                scores = self.reward.judge(batch)
        if self.world.dims.data < self.world.size:
            scores = decoded(self.world.gather_sharers(encoded(scores))[0])
        return scores

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


def encoded(scores: Sequence[Score]) -> list[Any]:
    """Scores as JSON."""
    return [list(astuple(score)) if isinstance(score, Failure) else score for score in scores]


def decoded(scores: Sequence[Any]) -> list[Score]:
    """The inverse of ``encoded``."""
    return [Failure(*score) if isinstance(score, list) else score for score in scores]


@dataclass(frozen=True)
class Pattern:
    """A regular expression whose . also matches line ends.

    Attributes:
        timeout: seconds for one text; some expressions take time exponential in its length.
    """

    text: str
    timeout: float

    def matches(self, text: str) -> bool:
        """Whether it matches the whole text."""
        try:
            return regex.fullmatch(self.text, text, regex.DOTALL, timeout=self.timeout) is not None
        except TimeoutError:
            return False

    def selected(self, text: str) -> str | None:
        """The first group of the last match, or without groups the whole match; None if there is no match."""
        try:
            last = deque(regex.finditer(self.text, text, regex.DOTALL, timeout=self.timeout), maxlen=1)
        except TimeoutError:
            return None
        return next((match[1] if match.re.groups else match[0] for match in last), None)
