"""The JSON lines that a stage writes: the rows of its metrics, what is new in them, and the stage's pace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc_rlhf.run.attempt_logs import TAIL_BYTES, read_tail
from hpc_rlhf.spec.stages import kind_of

_PACE_STEPS = 100  # how many of the latest steps the pace is measured over


@dataclass(frozen=True)
class Row:
    """One line of a metrics file.

    Attributes:
        step: steps done.
        total_steps: steps in all.
        time: when it was written, in Unix seconds.
        values: its metrics by name; None for one that was not finite.
    """

    step: int
    total_steps: int
    time: float
    values: dict[str, float | None]


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The objects in a text, one per line; incomplete lines are skipped."""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def read_text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def step_rows(text: str, stage: str) -> list[Row]:
    """The rows that a stage writes with every step."""
    return all_rows(text, stage)[0]


def held_out_rows(text: str) -> list[Row]:
    """The rows with measurements on held-out data."""
    return _rows(json_lines(text), "eval")


def all_rows(text: str, stage: str) -> tuple[list[Row], list[Row]]:
    """The rows that a stage writes with every step, and those with measurements on held-out data."""
    records = list(json_lines(text))
    measured = _rows(records, "eval")
    return (_rows(records, "train"), measured) if kind_of(stage).trains else (measured, measured)


def _rows(records: Iterable[dict[str, Any]], kind: str) -> list[Row]:
    rows = []
    for record in records:
        if record.get("kind") == kind:
            step, total, time = (record.pop(key, 0) for key in ("step", "total_steps", "time"))
            numbers = {
                name: value for name, value in record.items() if value is None or isinstance(value, (int, float))
            }
            rows.append(Row(step, total, time, numbers))
    return rows


def read_latest(path: Path, stage: str, share: float) -> str:
    """The end of a metrics file with at least the last ``share`` of the steps; empty if unreadable."""
    limit = TAIL_BYTES
    text = read_tail(path, limit)
    while True:
        rows = step_rows(text, stage)
        if rows and len(rows) >= share * rows[-1].total_steps:
            return text
        limit *= 4
        shorter, text = text, read_tail(path, limit)
        if len(text) == len(shorter):
            return text


@dataclass
class MetricsReader:
    """Follows a stage's metrics file."""

    path: Path
    stage: str
    _offset: int = 0
    _inode: int = 0

    def read_new(self) -> tuple[list[Row], list[Row], bool]:
        """The steps written since the last call, the evaluations, and whether both replace all earlier ones.

        A stage that resumes rewrites its file without the steps that were lost.
        """
        rewritten = False
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._inode, self._offset, rewritten = facts.st_ino, 0, True
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return [], [], False
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        new = complete.decode("utf-8", "replace")
        return *all_rows(new, self.stage), rewritten


def seconds_per_step(rows: Sequence[Row], starts: Iterable[float] = ()) -> float | None:
    """The mean time of the latest steps, including their evaluations and checkpoints; None if still unknown.

    Args:
        rows: step rows in order.
        starts: when attempts began, in Unix seconds. The gap between two attempts does not count.
    """
    begun = list(starts)
    steps = seconds = 0.0
    for row, after in pairwise(rows[-_PACE_STEPS - 1 :]):
        if not any(row.time < start <= after.time for start in begun):
            steps += after.step - row.step
            seconds += after.time - row.time
    return seconds / steps if steps > 0 and seconds > 0 else None
