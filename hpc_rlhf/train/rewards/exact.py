"""Rewards that compare text: the right answer, or the right format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.train.rewards.text import Pattern, Score, TextBatch


@dataclass(frozen=True)
class Exact:
    """1 if a response is the text in a column, apart from space around it, otherwise 0. None where the column is empty.

    Attributes:
        selects: the part of a response to compare; by default all of it.
    """

    column: str
    selects: Pattern | None = None

    def judge(self, batch: TextBatch) -> list[Score]:
        return [self._score(*row) for row in zip(batch.responses, batch.column(self.column), strict=True)]

    def _score(self, response: str, answer: object) -> float | None:
        if answer is None:
            return None
        text = self.selects.selected(response) if self.selects else response
        return float(text is not None and text.strip() == _written(answer).strip())


def _written(cell: Any) -> str:
    """Text as it is, anything else as JSON."""
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)


@dataclass(frozen=True)
class Format:
    """1 if a regular expression matches the whole response, otherwise 0."""

    pattern: Pattern

    def judge(self, batch: TextBatch) -> list[Score]:
        return [float(self.pattern.matches(response)) for response in batch.responses]
