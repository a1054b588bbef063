"""What an attempt left on disk that tells how it ended: the logs of its job, and how far its metrics go."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.run.layout import StageDir

_TAIL_BYTES = 1 << 16

# What the batch script says first, and puts into the logs of the ranks of attempts before; a requeued job goes on in
# the same files. A line before it may have been cut off in its midst.
_ATTEMPT = re.compile(r"hpc-rlhf: attempt (\d+) of job .*\n?")


@dataclass(frozen=True)
class AttemptLogs:
    """The logs of one attempt of a job, told from those of others by marks in them: clocks of two machines may differ.

    Attributes:
        files: the stage's.
        job_id: the job's.
        restart: how often the job had been requeued before this attempt; the last attempt that came to its script when None.
    """

    files: StageDir
    job_id: str
    restart: int | None = None

    @property
    def batch(self) -> str:
        return self._own(self.files.logs / f"{self.job_id}_batch.log")

    def last_line(self, rank: int) -> str:
        if not self.batch:  # no rank of it was started, so that what its log says is another's
            return ""
        said = self._own(self.files.log(self.job_id, rank, "err"))
        return next((line for line in reversed(said.splitlines()) if line.strip()), "")

    def _own(self, path: Path) -> str:
        return own_part(read_tail(path), self.restart)


def own_part(text: str, restart: int | None) -> str:
    """Of a log's text what was said after an attempt's mark; or before all marks, if the next attempt has the first.

    Args:
        restart: how often the job had been requeued before the attempt; the last one when None.
    """
    head, *parts = _ATTEMPT.split(text)  # after each number what that attempt said
    if restart is None:
        return parts[-1] if parts else head
    said_by = dict(zip(map(int, parts[::2]), parts[1::2], strict=True))
    if restart in said_by:
        return said_by[restart]
    return head if all(number > restart for number in said_by) else ""


def read_tail(path: Path) -> str:
    """The last 64 KiB of a text file, which may begin in the middle of a line; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def last_step(files: StageDir) -> int:
    """The last step in a stage's metrics; 0 before the first."""
    return int(_last_row(files).get("step", 0))


def last_seen(files: StageDir) -> float | None:
    """When the last line of a stage's metrics was written, in Unix seconds; None before the first."""
    return _last_row(files).get("time")


def _last_row(files: StageDir) -> dict[str, Any]:
    for line in reversed(read_tail(files.metrics).splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}
