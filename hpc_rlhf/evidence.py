"""What an attempt left on disk that tells how it ended: the logs of its job, and how far its metrics go."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.rundir import StageDir
from hpc_rlhf.tail import read_tail

# What the batch script says first; a requeued job goes on in the same file.
_ATTEMPT = re.compile(r"^hpc-rlhf: attempt (\d+) ", re.M)
_CLOCKS_DIFFER = 5.0


@dataclass(frozen=True)
class AttemptLogs:
    """The logs of one attempt of a job.

    Attributes:
        files: the stage's.
        job_id: the job's.
        since: when the attempt began, in Unix seconds; what was last written before is another's.
        restart: how often the job had been requeued before this attempt; the last attempt when None.
    """

    files: StageDir
    job_id: str
    since: float
    restart: int | None = None

    @property
    def batch(self) -> str:
        said = self._read(self.files.logs / f"{self.job_id}_batch.log")
        _, *parts = _ATTEMPT.split(said)  # after each number what that attempt said
        said_by = dict(zip(parts[::2], parts[1::2], strict=True))
        if not said_by:
            return said
        return said_by.get(str(self.restart), "") if self.restart is not None else parts[-1]

    def last_line(self, rank: int) -> str:
        said = self._read(self.files.log(self.job_id, rank, "err"))
        return next((line for line in reversed(said.splitlines()) if line.strip()), "")

    def _read(self, path: Path) -> str:
        try:
            recent = path.stat().st_mtime >= self.since - _CLOCKS_DIFFER
        except OSError:
            return ""
        return read_tail(path) if recent else ""


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
