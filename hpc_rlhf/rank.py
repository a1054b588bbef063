"""A rank's first and last steps: block signals until the stage can handle them, check the owner of what it
loads, run the stage, and exit.

A job that is preempted in the second in which Python loads would otherwise die of the signal, be recorded as failed,
and take the stages after it with it. A blocked signal is delivered as soon as the stage unblocks it.

submitit pickles a task into the log folder. Ranks do not load it, because a pickle can run any code; the path of that
folder names the same run and stage.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from hpc_rlhf import safe_path
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir, StageDir

BLOCKED = (signal.SIGTERM, signal.SIGUSR2)


def exit_after(main: Callable[[], object]) -> NoReturn:
    """Run a rank's work, and exit at once with its exit code.

    While Python shuts down, a remaining thread of gloo, NCCL or Arrow may abort the process. A rank that had
    saved, or had reported an error, would then count as crashed.
    """
    safe_path.protect(os.environ)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse_foreign(run: RunDir, stage: str) -> None:
    """Exit if somebody else could have written what this rank is about to load."""
    try:
        ownership.check(run, stage)
    except HpcRlhfError as error:
        print(f"hpc-rlhf: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def log_per_rank(stage: StageDir, env: Mapping[str, str]) -> None:
    """Write to this rank's own logs, as under srun, if another launcher between it and Slurm started it. The
    rank of a requeued job appends to the same files."""
    if env.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with stage.log(env["SLURM_JOB_ID"], int(env["RANK"]), name).open("ab") as log:
            os.dup2(log.fileno(), stream.fileno())


def main() -> None:
    """Run the stage with the log folder that is the command's argument."""
    folder = Path(sys.argv[1]).parent
    run, stage = RunDir(folder.parents[1]), folder.name
    refuse_foreign(run, stage)
    from hpc_rlhf.train.entry import run_stage

    run_stage(str(run.path), stage)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    exit_after(main)
