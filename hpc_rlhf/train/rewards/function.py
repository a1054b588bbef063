"""Rewards by a user's Python function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards.output import Output
from hpc_rlhf.train.rewards.text import Failure, Score, TextBatch
from hpc_rlhf.train.rewards.workers import Pool

# Of what a function last printed, in an error.
_SHOWN = 200


class FunctionReward:
    """The scores from a function, which runs in a process of its own; see ``user_function``.

    Args:
        timeout: seconds for a batch.
        should_stop: polled while waiting.

    Raises:
        HpcRlhfError: the file cannot be imported.
        WorkCancelled: ``should_stop`` returned True.
    """

    def __init__(self, file: Path, name: str, timeout: float, should_stop: Callable[[], bool] = bool) -> None:
        # Where it hangs is printed before its process is killed.
        arguments = {"file": str(file), "name": name, "seconds": max(timeout / 2, timeout - 1)}
        make = "hpc_rlhf.train.rewards.user_function:load"
        self._file, self._output = file, Output()
        self._pool = Pool(make, arguments, size=1, timeout=timeout, should_stop=should_stop, output=self._output)
        loaded = self._pool.start()
        if loaded.error is not None:
            self.close()
            hint = "only the file itself is copied into the run; install the other modules that it imports"
            exit_code = RUN_FAILED if loaded.too_long else INPUT_WRONG
            raise HpcRlhfError(f"the reward {name} {loaded.error}", where=str(file), hint=hint, exit_code=exit_code)

    def close(self) -> None:
        """End the process."""
        self._pool.close()
        self._output.close()

    def judge(self, batch: TextBatch) -> list[Score]:
        """A score for each response. If the function raises, it is called for each response alone, and then again
        without those for which it raises."""
        rows = range(len(batch))
        scores = self._ask(batch, rows) if rows else []
        if isinstance(scores, list):
            return scores
        if len(rows) == 1:
            return [Failure(scores)]
        alone = {row: self._ask(batch, [row]) for row in rows}
        raised = {row: Failure(why) for row, why in alone.items() if isinstance(why, str)}
        if len(raised) == len(rows):
            return [replace(failure, of_all=True) for failure in raised.values()]
        others = [row for row in rows if row not in raised]
        again = self._ask(batch, others) if raised else f"{scores}, but for none of them alone"
        if isinstance(again, str):
            again = [Failure(again, of_all=True)] * len(others)
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
        self._output.clear()
        (outcome,) = self._pool.map([keywords])
        if outcome.error is not None:
            return [Failure(outcome.error + self._place(), RUN_FAILED, of_all=True)] * len(rows)
        if isinstance(outcome.value, list) and len(outcome.value) != len(rows):
            return [Failure(f"gave {len(outcome.value)} scores for {len(rows)} responses", of_all=True)] * len(rows)
        return outcome.value

    def _place(self) -> str:
        """Where the function was when its process ended, as faulthandler prints it, or else what it last printed."""
        printed = self._output.tail.decode(errors="replace")
        if lines := re.findall(rf'File "{re.escape(str(self._file))}", line (\d+)', printed):
            return f" (line {lines[0]} of {self._file.name})"
        last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
        return f" after printing {last[:_SHOWN]!r}" if last else ""
