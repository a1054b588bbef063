"""What submitit pickles: a run directory and a stage's name. Everything else is read from disk when called.

``python -m hpc_rlhf.task RUN STAGE`` runs the same task as one rank under any other launcher.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageTask:
    """One stage of a run, to be called on every rank."""

    run_dir: str
    stage: str

    def __call__(self) -> None:
        from hpc_rlhf.train.entry import run_stage

        run_stage(self.run_dir, self.stage)


if __name__ == "__main__":
    from hpc_rlhf.rank import end_after, log_apart, refuse_foreign
    from hpc_rlhf.run.layout import RunDir

    # DeepSpeed's launcher puts --local_rank=N in front; the rank is read from the environment.
    run_dir, stage = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]

    def main() -> None:
        run = RunDir(Path(run_dir))
        refuse_foreign(run, stage)
        log_apart(run.stage(stage), os.environ)
        StageTask(run_dir, stage)()

    end_after(main)
