"""Ranks of a light stage: rank 1 fails in a given way while rank 0 works on its own, as in a rollout.

Run as ``python -m tests.train.failing_task RUN FAULT`` in the environment of a Slurm task. ``run_as_srun`` starts
the ranks and does what srun of Slurm 26.05 does when one of them fails.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hpc_rlhf.run.layout import RunDir
from tests.train.ranks import start

STEPS, FAULT_STEP = 4, 2
KILL_WAIT = 20.0
DEADLINE = 120.0
# Answers `scontrol show job` for a running job that was never preempted, and logs all commands.
SCONTROL = """#!/bin/bash
echo "$*" >>"$(dirname "$0")/commands"
echo "JobId=9 JobState=RUNNING Reason=None Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 \
StartTime=2026-01-01T10:00:00 EndTime=2036-01-01T11:00:00 PreemptTime=None"
"""


def run_as_srun(run: RunDir, fault: str, tools: Path) -> tuple[str, str]:
    """Run two ranks as Slurm 26.05 does: after one fails, the other gets CONT and TERM, and KILL after KillWait.

    Args:
        tools: a folder for the stand-in of scontrol.

    Returns:
        What srun would write into the batch log, and the scontrol commands of the ranks.
    """
    tools.mkdir()
    (tools / "scontrol").write_text(SCONTROL)
    (tools / "scontrol").chmod(0o755)
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "9",
        "SLURM_RESTART_COUNT": "0",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    run.stage("sft").logs.mkdir(parents=True, exist_ok=True)
    logs = [run.stage("sft").logs / f"test_{rank}.out" for rank in range(2)]
    ranks = start(["-m", "tests.train.failing_task", str(run.path), fault], logs, **slurm)
    lines: dict[int, str] = {}
    kill_at = deadline = time.monotonic() + DEADLINE
    try:
        while len(lines) < len(ranks) and time.monotonic() < deadline:
            for rank, process in enumerate(ranks):
                if rank in lines or process.poll() is None:
                    continue
                code = process.returncode
                how = f"Exited with exit code {code}" if code >= 0 else f"{signal.strsignal(-code)}"
                lines[rank] = f"srun: error: node{rank}: task {rank}: {how}" if code else ""
                if code and kill_at == deadline:
                    kill_at = time.monotonic() + KILL_WAIT
                    for other in ranks:
                        if other.poll() is None:
                            other.send_signal(signal.SIGCONT)
                            other.send_signal(signal.SIGTERM)
            if time.monotonic() > kill_at:
                for process in ranks:
                    process.kill()
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert len(lines) == len(ranks), "a rank did not end"
    commands = tools / "commands"
    return "\n".join(lines.values()), commands.read_text() if commands.exists() else ""


def main(path: str, fault: str) -> None:
    """One rank."""
    from hpc_rlhf.errors import HpcRlhfError
    from hpc_rlhf.run import manifest, notify
    from hpc_rlhf.train.entry import run_stage
    from hpc_rlhf.train.runtime import world as worlds
    from hpc_rlhf.train.stages import sft

    def fail(context: Any) -> None:
        if fault == "exception":
            raise ValueError("the loss is not finite")
        if fault == "user error":
            raise HpcRlhfError("no such data file", where="/scratch/a.jsonl")
        os.kill(os.getpid(), signal.SIGKILL)

    def run(context: Any) -> None:
        context.resume(lambda checkpoint: None)
        for step in range(STEPS):
            context.checkpoints.safe_point(step, lambda snapshot: None, {})
            if step == FAULT_STEP and fault != "killed at the end":
                if context.world.rank == 1:
                    fail(context)
                with context.stop.cancellable():
                    wait_for_signal(context.flag)
        if context.world.is_main:
            context.files.model.mkdir()
            (context.files.model / "weights").write_text("w")
            manifest.write(context.files.model, {"step": STEPS, "seconds": 1})
        context.world.barrier()

    def wait_for_signal(flag: Any) -> None:
        deadline = time.monotonic() + 30
        while not flag.code and time.monotonic() < deadline:
            time.sleep(0.05)

    sft.run = run
    if fault == "killed at the end":
        notify.send_if_finished = lambda *_: time.sleep(3)  # type: ignore[assignment]
        if os.environ["RANK"] == "1":
            worlds.leave = lambda: os.kill(os.getpid(), signal.SIGKILL)
    run_stage(path, "sft")


if __name__ == "__main__":
    from hpc_rlhf.rank import exit_after

    exit_after(lambda: main(*sys.argv[1:]))
