"""Start the ranks of one node of a Slurm job with torchrun or DeepSpeed's launcher, from the run's hostfile.

``python -m hpc_rlhf.launch.node RUN STAGE LAUNCHER`` becomes that launcher.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from hpc_rlhf import safe_path
from hpc_rlhf.launch.local.hostfile import read_hostfile
from hpc_rlhf.rank import BLOCKED
from hpc_rlhf.run.layout import RunDir


def command(run: RunDir, stage: str, launcher: str, env: Mapping[str, str]) -> list[str]:
    """The launcher of this node's ranks.

    Raises:
        HpcRlhfError: the hostfile cannot be read.
    """
    hostfile = read_hostfile(run.stage(stage).hostfile)
    host = env["SLURMD_NODENAME"]
    task = safe_path.module("hpc_rlhf.task", str(run.path), stage)
    if launcher == "torchrun":
        return hostfile.torchrun(host, task, env)
    # By default it assigns the first GPUs of the node; Slurm may have given this job others.
    gpus = env.get("CUDA_VISIBLE_DEVICES")
    return hostfile.deepspeed(host, task, env, gpus.split(",") if gpus else None)


def main(run: str, stage: str, launcher: str) -> None:
    """Become the launcher.

    Slurm signals every process of a job. These launchers would end their ranks on a signal that only requests a save,
    so it stays blocked in them for good, and in the ranks, which inherit the mask, until the stage handles it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    safe_path.protect(os.environ)
    words = command(RunDir(Path(run)), stage, launcher, os.environ)
    os.execv(words[0], words)


if __name__ == "__main__":
    main(*sys.argv[1:])
