"""Puts a stage that trains nothing in place of the real one, in every process that has this folder on PYTHONPATH.

It makes steps, saves some and resumes from them as real stages do, with one rank, in a fraction of their time. What is to
go wrong is in the file that STAND_IN_FAULT names, as `STAGE STEP WHAT [TEXT]`, for as long as that is there; see stumble().
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
    from hpc_rlhf.train import arrival

    run = RunDir(Path(run_dir))
    files, ledger = run.stage(stage), Ledger(run.ledger)
    job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    attempt = f"{job}-{restarts}"

    def note(event: str, **facts) -> None:
        ledger.append(event, stage, attempt=attempt, **facts)

    if manifest.defect(files.model) is None:
        return
    arrival.note_ending_before(run, stage, job, restarts)
    note("started", job_id=job, restart=restarts)
    arrival.put_sentinel_back(run, stage, job)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR2))
    kept = files.path / "kept"
    done = int(kept.read_text()) if kept.exists() else 0
    if done:
        note("resumed", step=done)
    for step in range(done + 1, STEPS + 1):
        time.sleep(SECONDS)
        stumble(stage, step, note)
        line = {"step": step, "total_steps": STEPS, "time": time.time(), "kind": "train", "loss": 1 / step}
        with files.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step % SAVE_EVERY == 0:
            kept.write_text(str(step))
            note("saved", step=step, seconds=0)
    files.model.mkdir(exist_ok=True)
    (files.model / "weights").write_text("w")
    manifest.write(files.model, {"step": STEPS, "seconds": 1})
    note("finished", step=STEPS, seconds=1)


def stumble(stage, step, note) -> None:
    """Do what is in store for this step."""
    fault = Path(os.environ["STAND_IN_FAULT"])
    if not fault.exists():
        return
    where, when, what, *text = fault.read_text().split(" ", 3)
    if (where, int(when)) != (stage, step):
        return
    if what == "raise":
        note("failed", message=f"RuntimeError: {text[0]}", host=os.environ["SLURMD_NODENAME"])
        sys.exit(1)
    if what == "mistake":
        note("failed", message=text[0], exit_code=2)
        sys.exit(2)
    if what == "die":  # once
        fault.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    while fault.exists():  # for a test to do something to the job
        time.sleep(0.05)


module = types.ModuleType("hpc_rlhf.train.entry")
module.run_stage = run_stage  # type: ignore[attr-defined]
sys.modules["hpc_rlhf.train.entry"] = module
