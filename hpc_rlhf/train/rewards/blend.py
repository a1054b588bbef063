"""Several rewards in one: their weighted sum, and each alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.further import PROMPT
from hpc_rlhf.train.rewards.committed import CommittedScores
from hpc_rlhf.train.rewards.text import Failure, Score
from hpc_rlhf.train.runtime.world import World

# Rewards are float32 on the device.
_LARGEST = 3.4e38
# An error shows this many characters each of prompt, response and columns.
_SHOWN = 300


class Source(Protocol):
    """A ``RewardSource`` whose scores may include failures."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> Sequence[Score]: ...


@dataclass(frozen=True)
class Part:
    """A reward of a blend.

    Attributes:
        weight: 0 only reports it.
        skips: a failure leaves its response out of training; otherwise it ends the stage.
        varies: it may score the same response differently the next time.
    """

    name: str
    source: Source
    weight: float = 1.0
    skips: bool = False
    varies: bool = False


@dataclass(frozen=True)
class Scores:
    """A blend's scores, each list with an entry for each response.

    Attributes:
        total: the weighted sum; None where no reward with a weight applies, or one failed.
        parts: each reward by its name, without its weight; None where it does not apply or failed.
        failed: True where a reward failed: the response takes no part in training.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failed: list[bool]


class Blend:
    """A ``RewardSource`` of several rewards.

    Args:
        tokenizer: decodes responses for errors.
        committed: stores the scores of rewards that vary.
    """

    def __init__(
        self, parts: Sequence[Part], tokenizer: Any, world: World, committed: CommittedScores | None = None
    ) -> None:
        self.parts = list(parts)
        self._tokenizer = tokenizer
        self._world = world
        self._committed = committed
        self._step = 0

    def begin(self, step: int, purpose: str) -> None:
        """Announce what the next calls score. An attempt that repeats the step gets the same scores, even from rewards
        that vary. Collective.

        Args:
            step: steps done.
            purpose: what is scored after these steps, such as "rollout" or "held-out"; part of a file's name.
        """
        self._step = step
        if self._committed is not None:
            self._committed.begin(step, purpose)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """The weighted sums of ``details``."""
        return self.details(prompts, responses, columns).total

    def details(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> Scores:
        """Every reward of each response. Collective, as ``RewardSource.score``.

        Raises:
            HpcRlhfError: a reward that does not skip failed, on any rank. All ranks raise the same.
        """
        scores = {part.name: self._scores(part, prompts, responses, columns) for part in self.parts}
        self._stop_at_failure(scores, prompts, responses, columns)
        failed = [any(isinstance(score, Failure) for score in row) for row in zip(*scores.values(), strict=True)]
        parts = {name: [None if isinstance(s, Failure) else s for s in column] for name, column in scores.items()}
        total = [None if failed[row] else self._sum(parts, row) for row in range(len(responses))]
        return Scores(total, parts, failed)

    def _scores(
        self, part: Part, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Sequence[Score]:  # fmt: skip
        def ask(all_of_them: bool) -> Sequence[Score]:
            if all_of_them:
                return _checked(part, part.source.score(prompts, responses, columns), len(responses))
            return part.source.score([], [], {name: [] for name in columns})

        if self._committed is None or not part.varies:
            return ask(True)
        rows = [
            [list(prompt), list(response), {name: column[row] for name, column in columns.items()}]
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        return self._committed.replayed(part.name, rows, part.skips, ask)

    def _sum(self, parts: Mapping[str, Sequence[float | None]], row: int) -> float | None:
        weighted = [(part.weight, parts[part.name][row]) for part in self.parts if part.weight]
        terms = [weight * score for weight, score in weighted if score is not None]
        return sum(terms) if terms else None

    def _stop_at_failure(
        self, scores: Mapping[str, Sequence[Score]], prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]],
    ) -> None:  # fmt: skip
        """Raise the first failure of a reward that does not skip, on all ranks."""
        own = None
        for part in self.parts:
            for row, score in enumerate(scores[part.name]):
                if isinstance(score, Failure) and not part.skips and own is None:
                    cells = {name: column[row] for name, column in columns.items() if name != PROMPT}
                    values = f", with {json.dumps(cells, ensure_ascii=False)[:_SHOWN]}" if cells else ""
                    response, prompt = (self._text(ids)[-_SHOWN:] for ids in (responses[row], prompts[row]))
                    which = f"response {row} of rank {self._world.rank},"
                    if score.of_all and len(responses) > 1:
                        which = f"all {len(responses)} responses of rank {self._world.rank}; the first is"
                    what = f"{score.why}, for {which} {response!r}, to {prompt!r}{values}"
                    own = (part.name, what, score.exit_code)
        failure = next((each for each in self._world.gather(own) if each is not None), None)
        if failure is not None:
            name, what, exit_code = failure
            raise HpcRlhfError(what, where=f"reward {name}", hint=_hint(self._step), exit_code=exit_code)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _hint(steps: int) -> str:
    if not steps:
        return "correct it and run again; on_error: skip leaves such responses out of training"
    return (
        "to continue without such responses, run again with on_error: skip; that and timeout may change in a run, "
        "but a function may not once it has trained"
    )


def _checked(part: Part, scores: Sequence[Score], count: int) -> list[Score]:
    """Scores, with a failure in place of each that is not finite in float32 or would not be once weighted. If there is
    not one score for each response, all are failures."""
    if len(scores) != count:
        return [Failure(f"gave {len(scores)} scores for {count} responses", of_all=True)] * count

    def check(score: Score) -> Score:
        if score is None or isinstance(score, Failure):
            return score
        largest = abs(score) * max(1.0, abs(part.weight))
        if math.isnan(score) or largest > _LARGEST:
            return Failure(f"gave {score}, which is not a finite number in float32")
        return float(score)

    return [check(score) for score in scores]
