"""What an attempt left in its logs and metrics: its own part of the logs, and its last step."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.run.layout import StageDir

TAIL_BYTES = 1 << 16
# Terminal colors, which Apptainer writes into logs, too.
_STYLE = re.compile("\x1b\\[[0-9;]*m")
# The first line of the batch script, which also adds it to the rank logs of earlier attempts: a requeued job
# continues in the same files. The line before it may be incomplete.
_ATTEMPT = re.compile(r"hpc-rlhf: attempt (\d+) of job .*\n?")


@dataclass(frozen=True)
class AttemptLogs:
    """The logs of one attempt of a job, found by marks in them, because machines' clocks may differ.

    Attributes:
        files: the stage's.
        job_id: the job's; None without Slurm, where the ledger has all that is known.
        restart: how often the job had been requeued before this attempt; None for the last attempt whose script ran.
    """

    files: StageDir
    job_id: str | None
    restart: int | None = None

    @property
    def batch(self) -> str:
        """What the batch script, srun and slurmstepd wrote."""
        return "" if self.job_id is None else self._own(self.files.logs / f"{self.job_id}_batch.log")

    def last_line(self, rank: int) -> str:
        """The last line of a rank's log; empty if there is none."""
        if self.job_id is None or not self.batch:  # none of its ranks started; the log is that of another attempt
            return ""
        lines = self._own(self.files.log(self.job_id, rank, "err")).splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")

    def _own(self, path: Path) -> str:
        return own_part(without_style(read_tail(path)), self.restart)


def without_style(text: str) -> str:
    """The text without terminal colors."""
    return _STYLE.sub("", text)


def own_part(text: str, restart: int | None) -> str:
    """An attempt's part of a log: what follows its mark, or precedes the mark of a later one.

    Args:
        restart: how often the job had been requeued before the attempt; None for the last one.
    """
    head, *parts = _ATTEMPT.split(text)  # each number, then that attempt's text
    if restart is None:
        return parts[-1] if parts else head
    by_restart = dict(zip(map(int, parts[::2]), parts[1::2], strict=True))
    if restart in by_restart:
        return by_restart[restart]
    return head if all(number > restart for number in by_restart) else ""


def read_tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """The last bytes of a text file, which may begin in the middle of a line; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
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
