"""The lines of a stage's metrics, read as they come, and the pace that they show."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc_rlhf.run.attempt_logs import TAIL_BYTES, read_tail
from hpc_rlhf.spec.stages import kind_of

Row = dict[str, Any]

_LATELY = 100  # steps


def step_rows(text: str, stage: str) -> list[Row]:
    """The lines of a metrics file that a stage adds with every step."""
    return _rows(text, "train" if kind_of(stage).trains else "eval")


def held_out_rows(text: str) -> list[Row]:
    """The lines of a metrics file that hold measurements on held-out data."""
    return _rows(text, "eval")


def _rows(text: str, kind: str) -> list[Row]:
    """The lines of one kind; torn lines are skipped."""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == kind:
            rows.append(row)
    return rows


def read_latest(path: Path, stage: str, share: float) -> str:
    """The end of a metrics file, with at least the last ``share`` of the stage's steps; empty if it cannot be read."""
    limit = TAIL_BYTES
    text = read_tail(path, limit)
    while True:
        rows = step_rows(text, stage)
        if rows and len(rows) >= share * rows[-1]["total_steps"]:
            return text
        limit *= 4
        shorter, text = text, read_tail(path, limit)
        if len(text) == len(shorter):
            return text


@dataclass
class MetricsReader:
    """Reads what is new in a stage's metrics."""

    path: Path
    stage: str
    _offset: int = 0
    _inode: int = 0

    def news(self) -> tuple[list[Row], bool]:
        """The steps written since the last call, and whether the file was written anew, so that they are all there are.

        A stage that resumes writes it anew, without the steps that were lost.
        """
        anew = False
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._inode, self._offset, anew = facts.st_ino, 0, True
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return [], False
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return step_rows(whole.decode("utf-8", "replace"), self.stage), anew


def seconds_a_step(rows: Sequence[Row], starts: Iterable[float] = ()) -> float | None:
    """What the last hundred steps took each, with their evaluations and saves; None where that cannot be told yet.

    Args:
        rows: lines of steps, in order.
        starts: when attempts began, in Unix seconds. From the step before one to the step after it is no step's time.
    """
    begun = list(starts)
    steps = seconds = 0.0
    lately = rows[-_LATELY - 1 :]
    for row, after in pairwise(lately):
        if not any(row["time"] < start <= after["time"] for start in begun):
            steps += after["step"] - row["step"]
            seconds += after["time"] - row["time"]
    return seconds / steps if steps > 0 and seconds > 0 else None
