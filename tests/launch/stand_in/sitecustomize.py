"""Puts a stage that trains nothing in place of the real one, in every process that has this folder on PYTHONPATH.

It makes steps, saves some and resumes from them as real stages do, in a fraction of their time. At a step that RUN/fault
names it does what that says; each line is `STAGE STEP WHAT [TEXT]`, and is obeyed by whoever comes there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from pathlib import Path

STEPS, SAVE_EVERY, SECONDS = 12, 4, 0.05


def run_stage(run_dir: str, stage: str) -> None:
    from hpc_rlhf import manifest
    from hpc_rlhf.ledger import Ledger
    from hpc_rlhf.rundir import RunDir

    run = RunDir(Path(run_dir))
    files, ledger, rank = run.stage(stage), Ledger(run.ledger), int(os.environ["SLURM_PROCID"])
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if manifest.defect(files.model) is None:
        return
    kept = files.path / "kept"
    step = int(kept.read_text()) if kept.exists() else 0
    if rank == 0:
        ledger.append("started", stage, attempt=attempt, job_id=os.environ["SLURM_JOB_ID"])
        if step:
            ledger.append("resumed", stage, attempt=attempt, step=step)
    for signals in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signals, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR2))
    while step < STEPS:
        step += 1
        time.sleep(SECONDS)
        stumble(
            run, stage, step, rank, lambda **facts: ledger.append("failed", stage, attempt=attempt, **facts)
        )
        if rank == 0:
            line = {
                "step": step,
                "total_steps": STEPS,
                "time": time.time(),
                "kind": "train",
                "loss": 1 / step,
            }
            with files.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if step % SAVE_EVERY == 0:
                kept.write_text(str(step))
                ledger.append("saved", stage, attempt=attempt, step=step, seconds=0)
    if rank == 0:
        files.model.mkdir(exist_ok=True)
        (files.model / "weights").write_text("w")
        manifest.write(files.model, {"step": STEPS, "seconds": 1})
        ledger.append("finished", stage, attempt=attempt, step=STEPS, seconds=1)


def stumble(run, stage, step, rank, failed) -> None:
    """Do what is in store for this step."""
    fault = run.path / "fault"
    for line in fault.read_text().splitlines() if fault.exists() else ():
        where, when, what, *text = line.split(" ", 3)
        if (where, int(when)) != (stage, step):
            continue
        if what == "raise":
            if rank == 0:
                failed(message=f"RuntimeError: {text[0]}", host=os.environ["SLURMD_NODENAME"])
            sys.exit(1)
        if what == "mistake":
            if rank == 0:
                failed(message=text[0], exit_code=2)
            sys.exit(2)
        if what == "wait":  # for a test to do something to the job
            while fault.exists():
                time.sleep(0.05)


module = types.ModuleType("hpc_rlhf.train.entry")
module.run_stage = run_stage  # type: ignore[attr-defined]
sys.modules["hpc_rlhf.train.entry"] = module
