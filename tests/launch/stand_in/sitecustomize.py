"""Puts training that learns nothing in place of the real one, in every process that has this folder on PYTHONPATH.

All else that an attempt does is the real thing: how it begins, hears signals, requeues its job and ends. With one rank,
without torch, it makes steps, saves some and resumes from them as real stages do, in a fraction of their time. What is
to go wrong is in the file that STAND_IN_FAULT names, a line `STAGE STEP WHAT [TEXT]` each; see stumble().
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

NAME = "hpc_rlhf.train.entry"
STEPS, SAVE_EVERY, SECONDS = 12, 4, 0.05


def run_stage(run_dir: str, stage: str) -> None:
    del sys.modules[NAME]
    entry = importlib.import_module(NAME)
    entry.Attempt.run = run
    entry.run_stage(run_dir, stage)


def run(self) -> None:
    from hpc_rlhf.run import manifest
    from hpc_rlhf.run.events import Finished, Started
    from hpc_rlhf.slurm import commands
    from hpc_rlhf.spec.load import read_spec
    from hpc_rlhf.train import job_start

    if os.environ.get("SLURM_PROCID", "0") != "0":
        follow(self)
        return
    spec = read_spec(self.files.job_yaml)
    self.is_main = True
    job_start.record_previous_end(self.files, self.stage, self.job, self.restarts)
    self.record(Started(job_id=self.job, restart=self.restarts, ranks=1, host=self.host))
    if commands.was_preempted(self.job):
        self.stop.preempt()
    job_start.restore_sentinel(self.files, self.stage, self.job)
    for need in spec.needs(self.stage):
        manifest.require(self.files.stage(need).model, f"the model of stage {need}")
    train(self, spec)
    files = self.files.stage(self.stage)
    files.model.mkdir(exist_ok=True)
    (files.model / "weights").write_text("w")
    manifest.write(files.model, {"step": STEPS, "seconds": 1})
    self.record(Finished(step=STEPS, seconds=1))


def follow(self) -> None:
    """What the other ranks do: they end with rank 0, or fail as `peer 1 raise TEXT` says."""
    from hpc_rlhf.run import manifest

    while not manifest.is_done(self.files.stage(self.stage)):
        if fault := in_store("peer", 1):
            forget(fault)
            raise RuntimeError(fault.split(" ", 3)[3])
        time.sleep(SECONDS)


def train(self, spec) -> None:
    """The steps after the last saved one. Raises what a stage raises that was told to stop, once that is saved."""
    from hpc_rlhf.run.events import Resumed, Saved
    from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StageStopped

    files = self.files.stage(self.stage)
    kept = files.path / "kept"

    def save(step: int) -> None:
        kept.write_text(str(step))
        self.record(Saved(step=step))

    done = int(kept.read_text()) if kept.exists() else 0
    if done:
        self.record(Resumed(step=done))
    for step in range(done + 1, STEPS + 1):
        time.sleep(SECONDS)
        stumble(self, step)
        if self.stop.code:
            save(step - 1)
            self.end_stopped(
                StageStopped(REASON_OF_CODE[self.stop.code], step - 1), spec.stage(self.stage).slurm.max_requeues
            )
        line = {"step": step, "total_steps": STEPS, "time": time.time(), "kind": "train", "loss": 1 / step}
        if self.stage == "ppo":
            line["reward"] = planted(spec.stages.ppo)
        with files.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if getattr(spec.stage(self.stage), "eval_every", None) and step % SAVE_EVERY == 0:
            evaluate(self, step, spec.stage(self.stage).lr)
        if step % SAVE_EVERY == 0:
            save(step)


def evaluate(self, step, lr) -> None:
    """Measure a perplexity that is lowest at one learning rate, and end a trial that is worse than others."""
    from hpc_rlhf.run.halving import stop_if_worse

    values = {"perplexity": 2 + abs(math.log10(lr) + 4)}
    line = {"step": step, "total_steps": STEPS, "time": time.time(), "kind": "eval", **values}
    with self.files.stage(self.stage).metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if step < STEPS:
        stop_if_worse(self.files, self.stage, step // SAVE_EVERY, step, STEPS, values)


def planted(ppo) -> float:
    """A reward of at most 0, which one kl_coef, one schedule and one way of scaling get."""
    wrong = (ppo.schedule != "cosine") + ppo.whiten_rewards
    return -abs(math.log10(ppo.kl_coef) + 1.2) / 3 - 0.3 * wrong


def stumble(self, step: int) -> None:
    """Do what is in store for this step."""
    from hpc_rlhf.errors import HpcRlhfError

    while fault := in_store(self.stage, step):
        what, *text = fault.split(" ", 3)[2:]
        if what == "raise":
            raise RuntimeError(text[0])
        if what == "mistake":
            raise HpcRlhfError(text[0])
        if what in ("raise-once", "die", "memory"):
            forget(fault)
        if what == "raise-once":
            raise RuntimeError(text[0])
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "memory":
            bytearray(1 << 60)
        if what == "wait" and self.stop.code:  # for a test to do something to the job
            return
        time.sleep(SECONDS)  # so for a "deaf" one, which hears no signal


def in_store(stage: str, step: int) -> str:
    """The line of the fault at a step; empty where none is."""
    return next((line for line in faults() if line.split(" ")[:2] == [stage, str(step)]), "")


def forget(fault: str) -> None:
    """It happens once. No test writes the file of such a fault at the same time."""
    Path(os.environ["STAND_IN_FAULT"]).write_text("".join(f"{line}\n" for line in faults() if line != fault))


def faults() -> list[str]:
    try:
        return Path(os.environ["STAND_IN_FAULT"]).read_text().splitlines()
    except FileNotFoundError:
        return []


module = types.ModuleType(NAME)
module.run_stage = run_stage  # type: ignore[attr-defined]
sys.modules[NAME] = module
