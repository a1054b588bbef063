"""The trained state of a DeepSpeed engine, as shards that do not depend on the number of ranks.

The state is the float32 weights, Adam's moments and the counters. Frozen weights are left out: they come from
the model that the stage starts from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.models.onebit_adam import OneBitAdam
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.runtime.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def pieces(engine: Any, world: World) -> list[Shard]:
    """Views of this rank's shards of the engine's weights and moments."""
    optimizer = internals.inner_optimizer(engine)
    shards: list[Shard] = []
    for number, fragment in enumerate(internals.fragments(engine)):
        # Of what every rank has, the ranks share the writing.
        mine = not fragment.replicated or number % world.dims.data == world.data_rank
        shards.append(Shard(f"weight {fragment.name}", fragment.start, fragment.of(fragment.stepped), mine))
        for key, moment in _moments(optimizer, fragment.stepped):
            shards.append(Shard(f"{key} {fragment.name}", fragment.start, fragment.of(moment), mine))
    return [*shards, *optimizer.pieces()] if isinstance(optimizer, OneBitAdam) else shards


def _moments(optimizer: torch.optim.Optimizer, stepped: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments of a tensor that it steps; none before the first step."""
    state = optimizer.state.get(stepped, {})
    return ((key, state[key]) for key in MOMENTS if key in state)


def facts(engine: Any, world: World) -> dict[str, Any]:
    """The counters and scalars beside the tensors, the same on every rank."""
    optimizer = internals.inner_optimizer(engine)
    if isinstance(optimizer, OneBitAdam):
        numbers = {"steps": optimizer.steps, "bytes_sent": optimizer.bytes_sent, "ranks": world.size}
    else:
        numbers = {"steps": _steps(optimizer)}
    return {
        "optimizer": numbers,
        "schedule": engine.lr_scheduler.last_epoch,
        "scale": internals.scale_state(engine),
        "counters": internals.counter_state(engine),
    }


def _steps(optimizer: torch.optim.Optimizer) -> float:
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state} or {0.0}
    assert len(steps) == 1, f"parameters have been stepped {sorted(steps)} times"
    return steps.pop()


def prepare(engine: Any, facts: dict[str, Any], where: Path, world: World) -> None:
    """Restore the numbers, and allocate the moments that a first step would allocate.

    Raises:
        HpcRlhfError: ``where`` can be resumed only by as many ranks as wrote it.
    """
    optimizer, numbers = internals.inner_optimizer(engine), facts["optimizer"]
    if isinstance(optimizer, OneBitAdam):
        if numbers["ranks"] != world.size:
            raise HpcRlhfError(
                f"onebit-adam keeps a momentum for each of {numbers['ranks']} ranks, but {world.size} were started",
                where=str(where),
                hint=f"resume with {numbers['ranks']} ranks",
                exit_code=RUN_FAILED,
            )
        optimizer.steps, optimizer.bytes_sent = numbers["steps"], numbers["bytes_sent"]
    elif numbers["steps"]:
        for stepped in internals.stepped_tensors(engine):
            moments = optimizer.state[stepped]
            for key in MOMENTS:
                moments.setdefault(key, torch.zeros_like(stepped))
            moments["step"] = torch.tensor(numbers["steps"], dtype=torch.float32, device=stepped.device)
    schedule = engine.lr_scheduler
    schedule.last_epoch = facts["schedule"]
    for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * rate(facts["schedule"])
    internals.restore_numbers(engine, facts["scale"], facts["counters"])
