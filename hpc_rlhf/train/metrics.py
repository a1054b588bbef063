"""The metrics of a stage: one JSON object per line, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.train.progress import ProgressLog


class MetricsLog:
    """Writes on rank 0, nothing elsewhere.

    Lines of steps after the one that the stage resumes from, whose work was lost, are removed: every step appears once.
    """

    def __init__(
        self, path: Path, tensorboard: Path, step: int, is_main: bool, part: int = 0,
        progress: ProgressLog | None = None,
    ) -> None:  # fmt: skip
        self.path, self.progress = path, progress
        self._writer: Any = None
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(path, step, part)
        self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def log(self, step: int, total_steps: int, kind: str, values: Mapping[str, float | None]) -> None:
        """Append a line. A value that is missing or not finite becomes null."""
        if self._writer is None:
            return
        finite = {key: v for key, v in values.items() if v is not None and math.isfinite(v)}
        record = {
            "step": step,
            "total_steps": total_steps,
            "time": round(time.time(), 3),
            "kind": kind,
            **dict.fromkeys(values),
            **{key: float(f"{value:.10g}") for key, value in finite.items()},  # a late learning rate is 1e-10
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
        if self.progress is not None:
            self.progress.note(step, total_steps, kind, values)
        for key, value in finite.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)

    def sync(self) -> None:
        """Flush to disk, before a checkpoint is committed, so that no committed step is missing here."""
        if self._writer is not None and self.path.exists():
            self._writer.flush()
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def keep_until(path: Path, step: int, part: int = 0) -> None:
    """Remove the lines of later steps from a JSONL file, atomically.

    What a stage measured after that step is removed, too: an attempt that resumes there measures it again, unless
    parts of the next step are done, or it is step 0, whose measurements come before its checkpoint.
    """
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")
        kept = [line + "\n" for line in lines if _position(line) <= (step, step == 0 or part > 0)]
        write_atomically(path, "".join(kept))


def _position(line: str) -> tuple[float, bool]:
    """A line's step, and whether it was written after that step's own checkpoint."""
    try:
        record = json.loads(line)
        return float(record["step"]), record.get("kind") in ("eval", "final")
    except (ValueError, KeyError, TypeError):
        return math.inf, True
