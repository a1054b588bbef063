"""Rewards by a program that judges each response alone, against a column."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from hpc_rlhf.errors import RUN_FAILED
from hpc_rlhf.train.rewards.text import Failure, Pattern, Score, TextBatch
from hpc_rlhf.train.rewards.workers import Pool


@dataclass(frozen=True)
class Verifier:
    """Scores from a pool of processes. None where the column is empty; 0 for a response that takes too long or ends its
    process.

    Attributes:
        name: the reward's, for the log.
        column: what responses are judged against.
        pool: its function takes ``[cell, response]`` and returns the score, or a list with the score and a remark for
            the log, or why there is no score, as ``Failure.why``.
        selects: the part of a response to judge; by default all of it. Where it finds nothing, the score is 0.
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
        scores: list[Score] = [None if cell is None else 0.0 for cell in cells]
        remarks: Counter[str] = Counter()
        for row, outcome in zip(rows, outcomes, strict=True):
            remark = outcome.error
            if outcome.unasked:
                scores[row] = Failure(str(outcome.error), RUN_FAILED)
            elif isinstance(outcome.value, str):
                scores[row] = Failure(outcome.value)
            elif isinstance(outcome.value, list):
                scores[row], remark = outcome.value
            elif outcome.error is None:
                scores[row] = outcome.value
            remarks.update(filter(None, [remark]))
        for remark, count in remarks.most_common(3):
            print(f"reward {self.name}: {count} of {len(rows)} responses: {remark}", file=sys.stderr, flush=True)
        return scores
