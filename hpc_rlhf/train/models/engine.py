"""DeepSpeed engines: a model with its optimizer and schedule, or a frozen one sharded for inference.

Checkpoints hold an engine's float32 weights, Adam's moments and its counters, as shards that do not depend on the
number of ranks. Frozen weights are left out: they come from the model that the stage starts from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.algorithms import schedule
from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.shards import Shard
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models import score_head
from hpc_rlhf.train.models.onebit_adam import OneBitAdam
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel.deepspeed_import import supports_fp16
from hpc_rlhf.train.parallel.tensor_parallel import split_of
from hpc_rlhf.train.runtime.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters: matrices with weight decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if len(internals.full_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(internals.full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """A stage's learning rates. It counts the steps that were made, and ends with the last of them.

    Attributes:
        skipped: optimizer steps of the stage that were not made and never will be.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, spec: TrainingSpec, total: int) -> None:
        self.skipped = 0
        warmup, decay = (schedule.phase_steps(steps, total) for steps in (spec.warmup, spec.decay))

        def factor(step: int) -> float:
            return schedule.factor(spec.schedule, step, warmup, total - self.skipped, decay, spec.decay_to)

        super().__init__(optimizer, factor)

    def at(self, made: int, skipped: int) -> None:
        """Set the learning rates after this many steps."""
        self.last_epoch, self.skipped = made, skipped
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(made)

    def skip(self, steps: int) -> None:
        """Leave out steps, so that the stage makes fewer."""
        self.at(self.last_epoch, self.skipped + steps)


def training_engine(model: nn.Module, ds_config: dict[str, Any], spec: TrainingSpec, lr: float, total: int) -> Any:
    """A DeepSpeed engine with the stage's optimizer and learning-rate schedule.

    Args:
        model: loaded within ``sharded_loading``, and split if the spec says so.
        total: optimizer steps of the whole stage.

    Raises:
        HpcRlhfError: this device does not support the spec's precision.
    """
    import deepspeed

    _check_precision(ds_config)
    config, groups = copy.deepcopy(ds_config), parameter_groups(model, spec.weight_decay)
    zero = config["zero_optimization"]
    trained = sum(internals.full_numel(p) for group in groups for p in group["params"])
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if name in zero:  # DeepSpeed allocates it whole, however small the model, and requires an even number
            zero[name] = min(zero[name], trained + trained % 2)
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "onebit-adam":
        optimizer = OneBitAdam(groups, lr, spec.betas, spec.clip_grad, spec.onebit_warmup, spec.eps)
        config["gradient_clipping"] = 0.0  # it clips by the averaged gradient's norm, which DeepSpeed never sees
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=spec.betas, eps=spec.eps, fused=True)
    internals.skip_autotp(model)  # ``split_model`` ran before the adapters wrapped the layers
    rate = Schedule(optimizer, spec, total)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=rate, config=config)
    internals.skip_input_check(engine)
    internals.discard_allocation_step(engine)
    internals.skip_reduction_alone(engine)
    if isinstance(optimizer, OneBitAdam):
        optimizer.start()
        internals.disable_gradient_averaging(engine)
    else:
        internals.check_overflow_by_norm(engine)
    score_head.write_masters(engine)
    score_head.read_masters(engine)
    engine.train()  # transformers loads models in eval mode: no dropout, no activation checkpointing
    return engine


def _check_precision(ds_config: dict[str, Any]) -> None:
    if ds_config.get("fp16", {}).get("enabled") and not supports_fp16():
        raise HpcRlhfError(
            "this device cannot train in float16",
            where="precision: fp16",
            hint="set precision: bf16, or fp32, or use a GPU",
        )


def frozen_engine(model: nn.Module, ds_config: dict[str, Any], device: torch.device) -> Any:
    """A model for inference only: sharded under ZeRO-3, split under tensor parallelism, whole otherwise."""
    split_model(model, ds_config.get("tensor_parallel", {}).get("autotp_size", 1))
    model.eval().requires_grad_(False)
    if ds_config["zero_optimization"]["stage"] != 3:
        return model.to(device)
    import deepspeed

    _check_precision(ds_config)
    engine, *_ = deepspeed.initialize(model=model, config=copy.deepcopy(ds_config))
    engine.eval()
    return engine


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: norm of the gradient before clipping; infinite if the step was skipped.
        applied: False if DeepSpeed skipped the step because a gradient was not finite: weights and Adam's moments are
            as before, and the learning-rate schedule has a step fewer to go.
    """

    grad_norm: float
    applied: bool

    @property
    def metrics(self) -> dict[str, float]:
        return {"grad_norm": self.grad_norm, "skipped": float(not self.applied)}


def optimizer_step(engine: Any, losses: Sequence[Callable[[], Tensor]]) -> StepResult:
    """One optimizer step on the summed gradients of several losses, which are called in order. Collective."""
    model, scale = internals.trained_model(engine), internals.unapplied_loss_scale(engine)
    if model is engine.module:
        norm = _pass_by_pass(engine, losses, scale)
    else:
        model.losses = iter(losses)
        internals.run_pipeline(engine, len(losses))
        norm = model.grad_norm
    score_head.read_masters(engine)
    if not engine.was_step_applied():
        engine.lr_scheduler.skip(1)
        return StepResult(math.inf, applied=False)  # DeepSpeed's norm would be an earlier step's
    optimizer = internals.inner_optimizer(engine)
    if isinstance(optimizer, OneBitAdam):
        return StepResult(optimizer.grad_norm, applied=True)
    known = engine.get_global_grad_norm()
    return StepResult(norm if known is None else float(known) / scale, applied=True)


def _pass_by_pass(engine: Any, losses: Sequence[Callable[[], Tensor]], scale: float) -> float:
    """A step without a pipeline; returns the gradient norm if DeepSpeed does not keep it.

    The accumulation boundary is set explicitly, so that the number of losses may differ from the configured
    accumulation, as with a pretraining mixture.
    """
    norm, onebit = 0.0, isinstance(internals.inner_optimizer(engine), OneBitAdam)
    for number, loss in enumerate(losses, 1):
        last = number == len(losses)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss() * scale)
        if last and not onebit and not internals.keeps_grad_norm(engine):
            norm = gradient_norm(engine.module, internals.tensor_parallel_group(engine))
        if last and internals.has_unfused_wrapper(engine):
            # It asks the gradients, not the parameters, whether this rank holds only a shard.
            for parameter in filter(internals.is_split, engine.module.parameters()):
                if parameter.grad is not None:
                    internals.mark_split(parameter.grad)
        engine.step()
    return norm


def gradient_norm(module: Any, group: Any) -> float:
    """The norm of all gradients; ``group`` is that of the ranks that share split layers, if there are any."""
    trained = [p for p in module.parameters() if p.grad is not None]
    if group is None:
        return float(torch.nn.utils.get_total_norm([p.grad for p in trained]))
    # What is whole on every rank counts once.
    counted = [p.grad for p in trained if internals.is_split(p) or dist.get_rank(group) == 0]
    square = torch.nn.utils.get_total_norm(counted).square()
    dist.all_reduce(square, group=group)
    return float(square.sqrt())


def learning_rate(engine: Any) -> float:
    return float(engine.optimizer.param_groups[0]["lr"])


def traffic(engines: Sequence[Any]) -> dict[str, float]:
    """Bytes that this rank sent for optimizer steps since the last call; only 1-bit Adam counts them."""
    optimizers = [internals.inner_optimizer(engine) for engine in engines]
    sent = [optimizer.take_bytes_sent() for optimizer in optimizers if isinstance(optimizer, OneBitAdam)]
    return {"bytes_sent": sum(sent)} if sent else {}


def save(engine: Any, snapshot: Snapshot, name: str, world: World) -> None:
    """Add an engine's state to a snapshot's folder, for any number of ranks to resume from. Collective."""
    shards.write(snapshot, name, pieces(engine, world), facts(engine, world), world)


def load(engine: Any, folder: Path, world: World) -> None:
    """Restore what ``save`` wrote. Collective.

    Raises:
        HpcRlhfError: it was written for another model, or this number of ranks cannot read it.
    """
    _prepare(engine, shards.read_facts(folder), folder, world)
    shards.read(folder, pieces(engine, world), world)
    internals.copy_masters_to_model(engine)
    score_head.read_masters(engine)


def pieces(engine: Any, world: World) -> list[Shard]:
    """Views of this rank's shards of the engine's weights and moments."""
    optimizer = internals.inner_optimizer(engine)
    views: list[Shard] = []
    for number, fragment in enumerate(internals.fragments(engine)):
        # Of what every rank has, the ranks share the writing.
        shared = number % world.dims.replicas != world.replica_rank
        mine = not fragment.copy and not (fragment.replicated and shared)
        own = partial(Shard, start=fragment.start, mine=mine, split=split_of(fragment.parameter))
        views.append(own(f"weight {fragment.name}", tensor=fragment.of(fragment.stepped)))
        state = optimizer.state.get(fragment.stepped, {})  # it has no moments before the first step
        for key in MOMENTS:
            if key in state:
                views.append(own(f"{key} {fragment.name}", tensor=fragment.of(state[key])))
    return [*views, *optimizer.pieces()] if isinstance(optimizer, OneBitAdam) else views


def facts(engine: Any, world: World) -> dict[str, Any]:
    """The counters and scalars beside the tensors, the same on every rank."""
    optimizer = internals.inner_optimizer(engine)
    numbers: dict[str, float]
    if isinstance(optimizer, OneBitAdam):
        numbers = {"steps": optimizer.steps, "bytes_sent": optimizer.bytes_sent, "ranks": world.size}
    else:
        steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state} or {0.0}
        assert len(steps) == 1, f"parameters have been stepped {sorted(steps)} times"
        numbers = {"steps": steps.pop()}
    rates = engine.lr_scheduler
    return {
        "optimizer": numbers, "schedule": rates.last_epoch, "skipped": rates.skipped, **internals.numbers(engine),
    }  # fmt: skip


def _prepare(engine: Any, facts: dict[str, Any], where: Path, world: World) -> None:
    """Restore the numbers, and allocate the moments that a first step would allocate."""
    optimizer, numbers = internals.inner_optimizer(engine), facts["optimizer"]
    if isinstance(optimizer, OneBitAdam):
        if numbers["ranks"] != world.size:
            raise HpcRlhfError(
                f"onebit-adam keeps a momentum for each of {numbers['ranks']} ranks, but {world.size} were started",
                where=str(where),
                hint=f"resume with {numbers['ranks']} ranks",
            )
        optimizer.steps, optimizer.bytes_sent = numbers["steps"], numbers["bytes_sent"]
    elif numbers["steps"]:
        for stepped in internals.stepped_tensors(engine):
            moments = optimizer.state[stepped]
            for key in MOMENTS:
                moments.setdefault(key, torch.zeros_like(stepped))
            moments["step"] = torch.tensor(numbers["steps"], dtype=torch.float32, device=stepped.device)
    engine.lr_scheduler.at(facts["schedule"], facts.get("skipped", 0))  # checkpoints of 0.1.0 do not count them
    internals.restore_numbers(engine, facts["scale"], facts["counters"])
