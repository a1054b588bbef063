"""What a DeepSpeed engine has learnt, as pieces that do not depend on the number of ranks: float32 weights, Adam's
moments and the numbers beside them.

Only what is trained is in it: frozen weights come from the model that the stage starts from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.checkpoint.shards import Piece
from hpc_rlhf.train.models.onebit_adam import OneBitAdam
from hpc_rlhf.train.runtime.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
# Of a loss scale that follows the gradients; which of them there are depends on the scaler.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def pieces(engine: Any, world: World) -> list[Piece]:
    """Views of all that this rank has of the engine's weights and moments."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_of_zero3(engine))
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_of_zero12(engine))
    own = engine.basic_optimizer.pieces() if isinstance(engine.basic_optimizer, OneBitAdam) else ()
    return [*_of_replicas(engine, world), *own]


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _of_zero3(engine: Any) -> Iterator[Piece]:
    optimizer, rank = engine.optimizer, dist.get_rank()
    for name, parameter in _trained(engine):
        group, offset, held = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * held
        count = min(held, parameter.ds_numel - start)  # the last rank's part may be padded
        if count <= 0:
            continue
        flat = optimizer.fp32_partitioned_groups_flat[group]
        yield Piece(f"weight {name}", start, flat.detach()[offset : offset + count])
        for key, moment in _moments(engine, flat):
            yield Piece(f"{key} {name}", start, moment[offset : offset + count])


def _of_zero12(engine: Any) -> Iterator[Piece]:
    for name, parameter in _trained(engine):
        part = parameter._hp_mapping
        if part is None:
            continue  # all of it is on other ranks
        flat = engine.optimizer.single_partition_of_fp32_groups[part.param_group_index]
        held = slice(
            part.hp_fragment_address.start, part.hp_fragment_address.start + part.hp_fragment_address.numel
        )
        start = part.lp_fragment_address.start
        yield Piece(f"weight {name}", start, flat.detach()[held])
        for key, moment in _moments(engine, flat):
            yield Piece(f"{key} {name}", start, moment[held])


def _of_replicas(engine: Any, world: World) -> Iterator[Piece]:
    """Every rank has all of them; they share out the writing."""
    masters = dict(_masters(engine))
    for number, (name, parameter) in enumerate(_trained(engine)):
        master = masters[parameter]
        mine = number % world.dims.data == world.data_rank
        yield Piece(f"weight {name}", 0, master.detach().view(-1), mine)
        for key, moment in _moments(engine, master):
            yield Piece(f"{key} {name}", 0, moment.view(-1), mine)


def _moments(engine: Any, stepped: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments of what its optimizer steps; none before the first step."""
    state = engine.basic_optimizer.state.get(stepped, {})
    return ((key, state[key]) for key in MOMENTS if key in state)


def _masters(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The float32 weights that the optimizer steps, by the model's own."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        yield from ((parameter, parameter) for _, parameter in _trained(engine))
        return
    for half, single in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(half, single, strict=True)


def _stepped(engine: Any) -> list[Tensor]:
    """What the optimizer inside DeepSpeed's has its state by."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [master for _, master in _masters(engine)]


# Numbers


def facts(engine: Any, world: World) -> dict[str, Any]:
    """The numbers beside the tensors, the same on every rank."""
    optimizer, scaler = engine.basic_optimizer, _scaler(engine)
    counted = {"steps": _steps(optimizer)}
    if isinstance(optimizer, OneBitAdam):
        counted = {"steps": optimizer.steps, "bytes_sent": optimizer.bytes_sent, "ranks": world.size}
    return {
        "optimizer": counted,
        "schedule": engine.lr_scheduler.last_epoch,
        "scale": {name: getattr(scaler, name) for name in SCALE if hasattr(scaler, name)},
        "counters": {name: getattr(engine, name) for name in COUNTERS},
    }


def _steps(optimizer: torch.optim.Optimizer) -> float:
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state} or {0.0}
    assert len(steps) == 1, f"parameters have been stepped {sorted(steps)} times"
    return steps.pop()


def _scaler(engine: Any) -> Any:
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return config or getattr(engine.optimizer, "loss_scaler", None)


def prepare(engine: Any, facts: dict[str, Any], where: Path, world: World) -> None:
    """Put the numbers back, and make the moments that a first step would make.

    Raises:
        HpcRlhfError: ``where`` has what only as many ranks as wrote it can go on from.
    """
    optimizer, counted = engine.basic_optimizer, facts["optimizer"]
    if isinstance(optimizer, OneBitAdam):
        if counted["ranks"] != world.size:
            raise HpcRlhfError(
                f"onebit-adam kept a momentum for each of {counted['ranks']} ranks, and there are {world.size} now",
                where=str(where),
                hint=f"go on with {counted['ranks']} ranks",
                exit_code=RUN_FAILED,
            )
        optimizer.steps, optimizer.bytes_sent = counted["steps"], counted["bytes_sent"]
    elif counted["steps"]:
        for stepped in _stepped(engine):
            moments = optimizer.state[stepped]
            for key in MOMENTS:
                moments.setdefault(key, torch.zeros_like(stepped))
            moments["step"] = torch.tensor(counted["steps"], dtype=torch.float32, device=stepped.device)
    schedule = engine.lr_scheduler
    schedule.last_epoch = facts["schedule"]
    for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * rate(facts["schedule"])
    for owner, numbers in ((_scaler(engine), facts["scale"]), (engine, facts["counters"])):
        for name, value in numbers.items():
            setattr(owner, name, value)


def settle(engine: Any) -> None:
    """Bring the model's own weights up to the float32 ones that have been put back. Collective."""
    optimizer = engine.optimizer
    with torch.no_grad():
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            optimizer.checkpoint_event_prologue()
            groups = zip(
                optimizer.fp32_partitioned_groups_flat,
                optimizer.fp16_partitioned_groups_flat,
                optimizer.fp16_partitioned_groups,
                strict=True,
            )
            for single, flat, parts in groups:
                flat.data.copy_(single.data)
                for part, values in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                    part.data = values.data
            optimizer.checkpoint_event_epilogue()
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            optimizer.update_lp_params()
        else:
            for parameter, master in _masters(engine):
                parameter.copy_(master)
