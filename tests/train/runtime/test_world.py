"""Ranks know their place under every launcher, and communicate."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.runtime.launcher import LAUNCHER_VARIABLES, launcher_ranks
from hpc_rlhf.train.runtime.world import World, join
from tests.train.ranks import reports

pytestmark = pytest.mark.slow

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
LOCAL = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        (SLURM, (3, 4, 1)),
        (LOCAL, (1, 2, 0)),
        ({**TORCHRUN, **SLURM}, (5, 8, 1)),  # torchrun inside a Slurm step
        ({**SLURM, **LOCAL, "SUBMITIT_EXECUTOR": "local"}, (1, 2, 0)),  # a local run inside an allocation
        ({**SLURM, "SUBMITIT_EXECUTOR": "slurm"}, (3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # a batch shell, not a task
    ],
)
def test_a_rank_knows_its_place(
    environment: dict[str, str], ranks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in LAUNCHER_VARIABLES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher_ranks() == ranks


def test_another_number_of_ranks_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HpcRlhfError, match="8 ranks were started where the plan has 4"):
        join(4)


def test_an_error_of_rank_0_keeps_all_its_parts(world: World) -> None:
    def fail() -> None:
        raise HpcRlhfError("wrong", where="here", hint="fix it", exit_code=RUN_FAILED)

    with pytest.raises(HpcRlhfError) as caught:
        world.on_main(fail)
    error = caught.value
    assert (error.message, error.where, error.hint, error.exit_code) == ("wrong", "here", "fix it", RUN_FAILED)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/file"), "No space left on device: '/data/file'"),
        (SafetensorError("Error while serializing: I/O error: Full (os error 28)"), "No space left on device"),
        (Exception("Disk quota exceeded (os error 122)"), "Disk quota exceeded"),  # as of tokenizers
    ],
)
def test_a_full_disk_is_a_clear_error(world: World, error: Exception, message: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(HpcRlhfError, match=message) as caught:
        world.on_main(fail)
    assert caught.value.exit_code == RUN_FAILED


def test_another_error_of_rank_0_keeps_its_kind(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        world.on_main(lambda: 1 // 0)


# What two ranks do together; each prints its results.
TWO_RANKS = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from hpc_rlhf.run import manifest
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.lora import LoraLinear
from hpc_rlhf.train.runtime.world import ParallelDims, World

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
world = World(rank, ParallelDims(2), torch.device("cpu"), dist.group.WORLD)
results = {
    "max": world.max(7 if rank else 3),
    "sums": world.sums({"a": rank + 0.5, "b": 1e-9 + rank * 1e9}),
    "gather": world.gather({"rank": rank}),
    "main": world.on_main(lambda: f"from {rank}"),
}

# Both in one tensor-parallel group: they have the same samples, which count once.
both = world.laid_out(2)
results["both"] = [
    both.data_rank, both.sums({"a": 3.0}), both.gather_data(rank), both.gather_sharers(rank)
]
results["apart"] = [world.gather_data(rank), world.gather_sharers(rank)]

def fail():
    raise HpcRlhfError("wrong", where="here")
try:
    world.on_main(fail)
except HpcRlhfError as error:
    results["error"] = str(error)

# Each rank writes its share, and the manifest lists all.
store = CheckpointStore(folder / "checkpoints", "1-0", keep=2, world=world)
store.claim()
for step in (10, 20):
    share = f"{rank} at {step}".encode()
    store.begin(step, lambda snapshot: snapshot.data(f"rank-{rank}", share), {"step": step}, copy=False)
    store.finish()
found = store.latest()
results["saved"] = [found.step, sorted(manifest.read(found.folder)["files"])]
world.barrier()
# The share of rank 1 is torn: both go back together.
if world.is_main:
    (folder / "checkpoints" / "step-00000020" / "rank-1").write_text("x")
world.barrier()
results["resumed"] = store.latest().step

# One rank has the average of a parameter, and both swap it in.
model = nn.Linear(2, 2)
nn.init.constant_(model.weight, 1.0)
nn.init.constant_(model.bias, 1.0)
ema = Ema(model, 0.5, world)
with torch.no_grad():
    model.weight.fill_(3.0)
    model.bias.fill_(5.0)
ema.update()
with ema.averaged_weights():
    results["ema"] = [model.weight[0, 0].item(), model.bias[0].item()]
layer = LoraLinear(nn.Linear(2, 3, bias=False), 1, 1.0, 0)
nn.init.constant_(layer.base.weight, 1.0)
ema = Ema(layer, 0.5, world)
with torch.no_grad():
    layer.lora_a.fill_(2.0)
    layer.lora_b.fill_(3.0)
ema.update()
with ema.averaged_weights():
    results["adapted"] = layer.merged_weight().tolist()
results["own"] = [model.weight[0, 0].item(), model.bias[0].item()]
print(json.dumps(results))
dist.destroy_process_group()
"""


def test_two_ranks_communicate_save_and_resume_together(tmp_path: Path) -> None:
    outputs = reports(TWO_RANKS, [str(tmp_path)], 2)
    expected = {
        "max": 7,
        "sums": {"a": 2.0, "b": 1e9 + 2e-9},
        "gather": [{"rank": 0}, {"rank": 1}],
        "main": "from 0",
        "error": "here: wrong",
        "saved": [20, ["rank-0", "rank-1"]],
        "resumed": 10,
        "ema": [2.0, 3.0],
        "adapted": [[4.0, 4.0]] * 3,
        "own": [3.0, 5.0],
    }
    groups = [{"both": [0, {"a": 3.0}, [0], [0, 1]], "apart": [[0, 1], [rank]]} for rank in range(2)]
    assert outputs == [{**expected, **own} for own in groups]


# A rank whose DeepSpeed engine creates process groups.
TIMEOUTS = """
import json
from datetime import timedelta
import torch
import torch.distributed as dist
from hpc_rlhf.train.runtime.world import join

world = join(1, timedelta(minutes=77))
import deepspeed
model = torch.nn.Linear(2, 2)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
groups = [group for group in dist.distributed_c10d._world.pg_map if group is not world.control]
minutes = [group._get_backend(world.device).options._timeout.total_seconds() / 60 for group in groups]
print(json.dumps({"minutes": minutes}))
"""


def test_every_group_of_torch_and_deepspeed_has_the_timeout_of_the_spec() -> None:
    minutes = reports(TIMEOUTS, [], 1)[0]["minutes"]
    assert len(minutes) > 1, "DeepSpeed created no groups"
    assert set(minutes) == {77.0}


# A rank whose threads multiply to numbers below the smallest normal one.
SUBNORMAL = """
import json
import torch
from hpc_rlhf.train.runtime.world import join

join(1)
torch.set_num_threads(2)
products = torch.full((1 << 20,), 1e-38) * 0.1
print(json.dumps({"nonzero": int(products.view(torch.int32).count_nonzero())}))
"""


def test_all_threads_of_a_rank_flush_subnormal_numbers_to_zero() -> None:
    assert reports(SUBNORMAL, [], 1) == [{"nonzero": 0}]
