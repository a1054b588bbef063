"""A stage with almost no training, killed at a call that touches the disk, and run again.

``python -m tests.train.faults FOLDER``, with the library of ``faults.c`` loaded before all others, prints as
JSON the calls of a save, and the results of a run that was killed at each of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import ParallelDims
from tests.train.stages import make_run, tiny_spec

STEPS = 5
KILL_STEP = 4  # the save after this step is killed; it also prunes an older checkpoint


class Alone(SimpleNamespace):
    """A world of one rank, which can be forked."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, data_rank=0, dims=ParallelDims(1), is_main=True)

    def on_main(self, make: Any) -> Any:
        return make()

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def laid_out(self, *_: int) -> Alone:
        return self


def train(run: RunDir, attempt: str, faults: Any, fatal: int) -> int:
    """A stage of a few steps, each saved; returns the number of calls in the save that is killed."""
    from hpc_rlhf.spec.load import read_spec

    context = StageContext(read_spec(run.job_yaml), "sft", run, Alone(), StopFlag(), attempt)  # type: ignore[arg-type]
    context.stop.consensus.agree = lambda numbers: [int(number) for number in numbers]  # type: ignore[method-assign]
    context.checkpoints.store.claim()
    weights = {"a": torch.arange(2000, dtype=torch.float64), "b": torch.ones(3)}

    def take(snapshot: Snapshot) -> None:
        snapshot.tensors("engine/a.safetensors", {"a": weights["a"]})
        snapshot.tensors("engine/b.safetensors", {"b": weights["b"]})

    def load(found: Checkpoint) -> None:
        for name in ("a", "b"):
            weights[name].copy_(load_file(found.folder / "engine" / f"{name}.safetensors")[name])

    found = context.resume(load)
    calls = 0
    for step in range(found.step if found else 0, STEPS + 1):
        if step == KILL_STEP:
            faults.fault_arm(fatal)
        context.checkpoints.safe_point(step, take, {})
        context.checkpoints.commit()
        context.checkpoints.store.wait_until_idle()
        if step == KILL_STEP:
            calls = faults.fault_disarm()
        if step < STEPS:
            for tensor in weights.values():
                tensor.mul_(1.0001).add_(step)
            context.metrics.log(step + 1, STEPS, "train", {"sum": float(weights["a"].sum())})
    return calls


def outputs(run: RunDir) -> dict[str, Any]:
    """The results of a run: its last checkpoint's hashes, its metrics, and the checkpoints that are kept."""
    checkpoints = run.stage("sft").checkpoints
    last = json.loads((checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text())
    lines = [json.loads(line) for line in run.stage("sft").metrics.read_text().splitlines()]
    return {
        "files": last["files"],
        "metrics": [(line["step"], line["sum"]) for line in lines],
        "kept": sorted(path.name for path in checkpoints.iterdir() if path.name.startswith(("step-", "tmp-"))),
    }


def forked(work: Any) -> int:
    """Run a function in a forked process; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> dict[str, Any]:
    import torch.utils.tensorboard

    import hpc_rlhf.train.metrics  # noqa: F401  # once, not in every child

    torch.utils.tensorboard.SummaryWriter = lambda *_, **__: SimpleNamespace(  # type: ignore[misc]
        add_scalar=lambda *_: None, flush=lambda: None
    )
    faults = ctypes.CDLL(None)
    whole = make_run(tiny_spec(folder / "whole", 1, sft={"checkpoint_every": 1}))
    calls = train(whole, "whole", faults, 0)
    found: dict[str, Any] = {"calls": calls, "killed": 0, "wrong": []}
    expected = outputs(whole)
    job, configs = whole.job_yaml.read_text(), whole.scripts
    for number in range(1, calls + 1):
        run = RunDir(folder / f"at-{number}")
        run.path.mkdir()
        run.job_yaml.write_text(job)
        run.scripts.symlink_to(configs)
        code = forked(lambda run=run, number=number: train(run, "first", faults, number))
        found["killed"] += code == -9
        again = forked(lambda run=run: train(run, "second", faults, -1))
        results = outputs(run) if again == 0 else {}
        if code != -9 or results != expected:
            found["wrong"].append((number, code, again, results))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
