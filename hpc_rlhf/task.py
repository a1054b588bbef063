"""The task that submitit pickles: a run directory and a stage name. The rest is read from disk when the task runs.

No rank loads the pickle. ``python -m hpc_rlhf.task RUN STAGE`` runs the task as one rank under any launcher but srun.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageTask:
    """One stage of a run, called on every rank."""

    run_dir: str
    stage: str

    def __call__(self) -> None:
        from hpc_rlhf.train.entry import run_stage

        run_stage(self.run_dir, self.stage)


if __name__ == "__main__":
    from hpc_rlhf.rank import exit_after, log_per_rank, refuse_foreign
    from hpc_rlhf.run.layout import RunDir

    run_dir, stage = sys.argv[1:]

    def main() -> None:
        run = RunDir(Path(run_dir))
        refuse_foreign(run, stage)
        log_per_rank(run.stage(stage), os.environ)
        StageTask(run_dir, stage)()

    exit_after(main)
