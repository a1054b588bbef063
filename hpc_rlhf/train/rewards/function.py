"""Rewards by a user's Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards.text import Failure, Score, TextBatch
from hpc_rlhf.train.rewards.workers import Pool


class FunctionReward:
    """A function's scores; see ``user_function``. It runs in a process of its own, which gets a batch at a time.

    Args:
        timeout: seconds for a batch.
        should_stop: polled while waiting.

    Raises:
        HpcRlhfError: the file cannot be imported.
        WorkCancelled: ``should_stop`` returned True.
    """

    def __init__(self, file: Path, name: str, timeout: float, should_stop: Callable[[], bool] = bool) -> None:
        arguments = {"file": str(file), "name": name}
        make = "hpc_rlhf.train.rewards.user_function:load"
        self._pool = Pool(make, arguments, size=1, timeout=timeout, should_stop=should_stop)
        loaded = self._pool.start()
        if loaded.error is not None:
            self.close()
            hint = "of the file's folder, only the file is copied into the run; install what else it imports"
            exit_code = RUN_FAILED if loaded.too_long else INPUT_WRONG
            raise HpcRlhfError(f"the reward {name} {loaded.error}", where=str(file), hint=hint, exit_code=exit_code)

    def close(self) -> None:
        """End the process."""
        self._pool.close()

    def judge(self, batch: TextBatch) -> list[Score]:
        """A score for each response. If the function raises, it is called for each response alone, and then again
        without those for which it raises."""
        rows = range(len(batch))
        scores = self._ask(batch, rows) if rows else []
        if isinstance(scores, list):
            return scores
        alone = {row: self._ask(batch, [row]) for row in rows} if len(rows) > 1 else {0: scores}
        raised = {row: Failure(why) for row, why in alone.items() if isinstance(why, str)}
        others = [row for row in rows if row not in raised]
        again = self._ask(batch, others) if raised and others else scores
        if isinstance(again, str):
            again = [Failure(again)] * len(others)
        by_row: dict[int, Score] = {**dict(zip(others, again, strict=True)), **raised}
        return [by_row[row] for row in rows]

    def _ask(self, batch: TextBatch, rows: Sequence[int]) -> list[Score] | str:
        """The function's scores of some rows, or what it raised."""
        responses = [batch.responses[row] for row in rows]
        keywords = {name: [column[row] for row in rows] for name, column in batch.columns.items()}
        keywords |= {
            "prompts": [batch.prompts[row] for row in rows],
            "completions": responses,
            "responses": responses,
            "completion_ids": [batch.response_ids[row] for row in rows],
        }
        (outcome,) = self._pool.map([keywords])
        if outcome.error is not None:
            return [Failure(outcome.error, RUN_FAILED)] * len(rows)
        if isinstance(outcome.value, list) and len(outcome.value) != len(rows):
            return [Failure(f"gave {len(outcome.value)} scores for {len(rows)} responses")] * len(rows)
        return outcome.value
