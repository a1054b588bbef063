"""What an attempt left on disk that tells how it ended: the logs of its job, and how far its metrics go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.rundir import StageDir
from hpc_rlhf.tail import read_tail

# What the batch script says first; a requeued job goes on in the same file.
_ATTEMPT = "hpc-rlhf: attempt "
_CLOCKS_DIFFER = 5.0


@dataclass(frozen=True)
class AttemptLogs:
    """The logs of the latest attempt of a job.

    Attributes:
        files: the stage's.
        job_id: the job's.
        since: when the attempt began, in Unix seconds; what was last written before is another's.
    """

    files: StageDir
    job_id: str
    since: float

    @property
    def batch(self) -> str:
        said = self._read(self.files.logs / f"{self.job_id}_batch.log")
        return said[said.rfind(_ATTEMPT) :] if _ATTEMPT in said else said

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
    for line in reversed(read_tail(files.metrics).splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return int(row["step"])
    return 0
