"""The SFT stage with a real DeepSpeed engine, killed at each disk call of a save, and run again.

``python -m tests.train.faults_engine FOLDER``, with the library of ``faults.c`` loaded before all others. One
process imports, prepares the data and makes the engine, once; every run is a fork of it. So it is one rank,
and its process group one without threads, which a fork would not have.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import ParallelDims, World
from hpc_rlhf.train.stages import learner, sft
from tests.train.faults import forked
from tests.train.stages import make_run, metrics, tiny_spec, weights_digest

STEPS = 3
KILL_STEP = 2  # by the save after this step an older checkpoint is pruned


class Alone(World):
    """One rank, which communicates with itself."""

    def on_main(self, make: Any) -> Any:
        return make()

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        return dict(numbers)

    def max(self, number: int) -> int:
        return number

    def barrier(self) -> None:
        pass


def train(run: RunDir, attempt: str, world: World, faults: Any, fatal: int) -> None:
    """Run the stage with every step saved; the number of calls in the save that is killed goes to a file."""
    context = StageContext(read_spec(run.job_yaml), "sft", run, world, StopFlag(), attempt)
    context.stop.consensus.agree = lambda numbers: [int(number) for number in numbers]  # type: ignore[method-assign]
    context.stop.consensus.agree_between = lambda kind, numbers: []  # type: ignore[method-assign]
    context.checkpoints.store.claim()
    begin = context.checkpoints.safe_point

    def safe_point(step: int, *rest: Any) -> None:
        if step == KILL_STEP:
            faults.fault_arm(fatal)
        begin(step, *rest)
        context.checkpoints.commit()
        context.checkpoints.store.wait_until_idle()
        if step == KILL_STEP:
            (run.path / "calls").write_text(str(faults.fault_disarm()))

    context.checkpoints.safe_point = safe_point  # type: ignore[method-assign, assignment]
    sft.run(context)


def outputs(run: RunDir) -> dict[str, Any]:
    """The results of a run: its weights, its metrics, and the checkpoints that are kept."""
    rows = [{key: value for key, value in row.items() if key != "time"} for row in metrics(run, "sft")]
    kept = sorted(path.name for path in run.stage("sft").checkpoints.glob("*-*") if path.name[0] != ".")
    return {"weights": weights_digest(run, "sft"), "metrics": rows, "kept": kept}


def make_once(run: RunDir, world: World) -> None:
    """Create data, model and engine once, for all runs of the stage."""
    context = StageContext(read_spec(run.job_yaml), "sft", run, world, StopFlag(), "before")
    data, tokenizer = context.data(), context.tokenizer
    model = sft.load_causal(context.start_model(context.spec.models.actor), context.dtype, 0.0)
    spec: Any = context.stage_spec
    engine = engines.training_engine(LanguageModel(model), context.ds_config, spec, spec.lr, STEPS)
    sft.load_causal = lambda *_: model
    engines.training_engine = lambda *_: engine
    StageContext.data = lambda _: data  # type: ignore[method-assign]
    StageContext.tokenizer = tokenizer


def main(folder: Path) -> dict[str, Any]:
    import torch.utils.tensorboard

    torch.utils.tensorboard.SummaryWriter = lambda *_, **__: SimpleNamespace(  # type: ignore[misc]
        add_scalar=lambda *_: None, flush=lambda: None
    )
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as ``hpc_rlhf.train.runtime.world.join`` does
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    world = Alone(0, ParallelDims(1), torch.device("cpu"), dist.group.WORLD)
    learner.evaluated_rows = partial(learner.evaluated_rows, most=4)  # evaluation is not tested here
    faults = ctypes.CDLL(None)
    fields = {"checkpoint_every": 1, "max_steps": STEPS, "zero": 1}
    whole = make_run(tiny_spec(folder / "whole", 1, sft=fields))
    make_once(whole, world)
    assert forked(lambda: train(whole, "whole", world, faults, 0)) == 0
    calls, expected = int((whole.path / "calls").read_text()), outputs(whole)
    found: dict[str, Any] = {"calls": calls, "killed": 0, "wrong": []}
    job = whole.job_yaml.read_text()
    for number in range(1, calls + 1):
        run = RunDir(folder / f"at-{number}")
        run.path.mkdir()
        run.job_yaml.write_text(job)
        run.scripts.symlink_to(whole.scripts)
        code = forked(lambda run=run, number=number: train(run, "first", world, faults, number))
        found["killed"] += code == -9
        again = forked(lambda run=run: train(run, "second", world, faults, -1))
        results = outputs(run) if again == 0 else {}
        if code != -9 or results != expected:
            found["wrong"].append((number, code, again, results))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
