"""A rank's first and last steps: hold back the signals until the stage can act on them, see that what it loads is its
owner's, hand over to submitit, and end.

Without the first, a job preempted in the second in which Python and submitit load would die of the signal, be recorded
as failed, and take the stages after it along. Held back, the signal is heard as soon as the stage listens.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir, StageDir

HELD_BACK = (signal.SIGTERM, signal.SIGUSR2)


def end_after(main: Callable[[], object]) -> NoReturn:
    """Do a rank's work, and end the process at once with the exit code of that.

    As Python winds down, a thread of gloo, NCCL or Arrow that is still there may abort the process. A rank that had
    saved, or had told what is wrong, would count as crashed.
    """
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
    """End this rank where somebody else could have written what it is about to load."""
    try:
        ownership.check(run, stage)
    except HpcRlhfError as error:
        print(f"hpc-rlhf: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def log_apart(stage: StageDir, env: Mapping[str, str]) -> None:
    """Write to logs of this rank's own from here on, as srun has every task do, where a launcher between us and Slurm
    started it. A requeued job's rank goes on in the same files."""
    if env.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with stage.log(env["SLURM_JOB_ID"], int(env["RANK"]), name).open("ab") as log:
            os.dup2(log.fileno(), stream.fileno())


def main() -> None:
    """Run what submitit pickled into a stage's folder of logs, the command's argument."""
    stage = Path(sys.argv[1]).parent
    refuse_foreign(RunDir(stage.parents[1]), stage.name)
    from submitit.core.submission import submitit_main

    submitit_main()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    end_after(main)
