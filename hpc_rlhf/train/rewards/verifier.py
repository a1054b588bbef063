"""Rewards by a program that judges each response alone, against what a column says."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_rlhf.errors import RUN_FAILED
from hpc_rlhf.train.rewards.text import Failure, Pattern, Score, TextBatch
from hpc_rlhf.train.rewards.workers import Outcome, Pool


@dataclass(frozen=True)
class Verifier:
    """Scores by a pool. None where the column is empty; 0 for a response that takes too long or ends its process.

    Attributes:
        name: of the reward, for the log.
        column: what a response is judged by.
        pool: its function takes ``[cell, response]`` and returns a number, or why there is none, as ``Failure.why``.
        selects: what of a response is judged; by default all of it. Where it finds nothing, the score is 0.
    """

    name: str
    column: str
    pool: Pool
    selects: Pattern | None = None

    def judge(self, batch: TextBatch) -> list[Score]:
        cells = batch.column(self.column)
        select = self.selects.selected if self.selects else str
        texts = [None if cell is None else select(text) for cell, text in zip(cells, batch.responses, strict=True)]
        rows = [row for row, text in enumerate(texts) if text is not None]
        outcomes = self.pool.map([[cells[row], texts[row]] for row in rows])
        self._report(outcomes)
        scores: list[Score] = [None if cell is None else 0.0 for cell in cells]
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.unasked:
                scores[row] = Failure(str(outcome.error), RUN_FAILED)
            elif outcome.error is None:
                scores[row] = Failure(outcome.value) if isinstance(outcome.value, str) else outcome.value
        return scores

    def _report(self, outcomes: Sequence[Outcome]) -> None:
        """Log why responses count as wrong that could not be judged."""
        reasons = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
        for reason, count in reasons.most_common(3):
            print(f"reward {self.name}: {count} of {len(outcomes)} responses: {reason}", file=sys.stderr, flush=True)
