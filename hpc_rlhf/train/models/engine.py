"""DeepSpeed engines: a model with its optimizer and schedule, or a frozen one sharded for inference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.algorithms import schedule
from hpc_rlhf.train.checkpoint import shards
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.models import engine_state
from hpc_rlhf.train.models.onebit_adam import OneBitAdam
from hpc_rlhf.train.parallel.tensor_parallel import cut, is_cut, mark
from hpc_rlhf.train.runtime.world import World


@contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within it, transformers loads models in ZeRO-3 shards, if that is the configured stage."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(copy.deepcopy(ds_config))  # transformers holds it by a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters, matrices with weight decay and vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def dimensions(parameter: Any) -> int:
        return len(getattr(parameter, "ds_shape", parameter.shape))  # a ZeRO-3 shard is flat

    groups = [
        {"params": [p for p in trained if dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def training_engine(
    model: nn.Module, ds_config: dict[str, Any], spec: TrainingSpec, lr: float, total: int
) -> Any:
    """A DeepSpeed engine with the stage's optimizer and learning-rate schedule.

    Args:
        model: loaded within ``sharded_loading``, and cut if the spec says so.
        total: optimizer steps in all.
    """
    import deepspeed

    config, groups = copy.deepcopy(ds_config), parameter_groups(model, spec.weight_decay)
    _fit_buckets(config["zero_optimization"], groups)
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "onebit-adam":
        optimizer = OneBitAdam(groups, lr, spec.betas, spec.clip_grad, spec.onebit_warmup)
        config["gradient_clipping"] = 0.0  # it clips by the norm of the average, which DeepSpeed does not see
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=spec.betas, fused=True)
    model.ds_autotp_parsed = True  # type: ignore[assignment]  # by ``cut``, before adapters were laid over the layers
    rate = partial(_rate, spec.schedule, min(spec.warmup, total), total)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, rate),
        config=config,
    )
    _forget_first_step(engine)
    if isinstance(optimizer, OneBitAdam):
        optimizer.start()
        engine.enable_backward_allreduce = False
    elif hasattr(engine.optimizer, "overflow_checker"):
        # Half precision without ZeRO: DeepSpeed skips a step whose norm is not finite, and has looked for that in every
        # gradient by itself before. The norm is the same on all ranks, where their gradients have been averaged.
        engine.optimizer.overflow_checker.check = bool
    engine.train()  # transformers loads models in eval mode: no dropout, no activation checkpointing
    return engine


def _fit_buckets(zero: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Make no buffer for more gradients than there are; DeepSpeed allocates it whole, however small the model."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if name in zero:
            zero[name] = min(zero[name], trained + trained % 2)  # DeepSpeed wants an even number


def _forget_first_step(engine: Any) -> None:
    """Half precision without ZeRO: begin where the optimizer was made.

    DeepSpeed 0.19 has the state allocated by a step on gradients of 0. It decays weights, and Adam counts it: its
    averages would be taken for further on than they are, and the first updates be a quarter too small.
    """
    if isinstance(engine.optimizer, _wrapper()):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


def _wrapper() -> Any:
    """What DeepSpeed lays around an optimizer for half precision without ZeRO."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return FP16_UnfusedOptimizer


def _rate(name: str, warmup: int, total: int, step: int) -> float:
    return schedule.factor(name, step, warmup, total)


def frozen_engine(model: nn.Module, ds_config: dict[str, Any], device: torch.device) -> Any:
    """A model for inference only: sharded under ZeRO-3, cut under tensor parallelism, whole otherwise."""
    cut(model, ds_config.get("tensor_parallel", {}).get("autotp_size", 1))
    model.eval().requires_grad_(False)
    if ds_config["zero_optimization"]["stage"] != 3:
        return model.to(device)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=copy.deepcopy(ds_config))
    engine.eval()
    return engine


def optimizer_step(engine: Any, losses: Sequence[Callable[[], Tensor]]) -> float:
    """One optimizer step on the sum of several losses' gradients.

    The accumulation boundary is set by hand, so that the number of losses may differ from the configured
    accumulation, as with a pretraining mixture.

    Args:
        losses: each makes its loss when called, and is called in order.

    Returns:
        The norm of the gradient before it was clipped.
    """
    norm, scale = 0.0, _unapplied_scale(engine)
    onebit = engine.basic_optimizer if isinstance(engine.basic_optimizer, OneBitAdam) else None
    for number, loss in enumerate(losses, 1):
        last = number == len(losses)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss() * scale)
        if last and not onebit and not hasattr(engine.optimizer, "_global_grad_norm"):
            # Float32 without ZeRO: DeepSpeed clips by torch and does not keep the norm.
            norm = _gradient_norm(engine)
        if last and isinstance(engine.optimizer, _wrapper()):
            # It asks the gradients themselves whether this rank has but a part, for their norm.
            for parameter in filter(is_cut, engine.module.parameters()):
                if parameter.grad is not None:
                    mark(parameter.grad)
        engine.step()
    if onebit:
        return math.inf if getattr(engine.optimizer, "overflow", False) else onebit.grad_norm
    known = engine.get_global_grad_norm()
    return norm if known is None else float(known) / scale


def _gradient_norm(engine: Any) -> float:
    """Of all gradients, of which those of cut layers are shared out over a group."""
    found = [p for p in engine.module.parameters() if p.grad is not None]
    if engine.mpu is None:
        return float(torch.nn.utils.get_total_norm([p.grad for p in found]))
    group = engine.mpu.get_tensor_model_parallel_group()
    counted = [p.grad for p in found if is_cut(p) or dist.get_rank(group) == 0]
    square = torch.nn.utils.get_total_norm(counted).square()
    dist.all_reduce(square, group=group)
    return float(square.sqrt())


def _unapplied_scale(engine: Any) -> float:
    """What float16 losses are to be multiplied with by hand.

    Without ZeRO, DeepSpeed 0.19 takes the loss scale out of the gradients in its step, but its engine never put
    it in: small gradients would be lost, and those that are left too small for Adam's epsilon and for clipping.
    """
    return float(engine.optimizer.loss_scale) if isinstance(engine.optimizer, _wrapper()) else 1.0


def learning_rate(engine: Any) -> float:
    return float(engine.optimizer.param_groups[0]["lr"])


def traffic(engines: Sequence[Any]) -> dict[str, float]:
    """Bytes that this rank sent for optimizer steps since this was last asked; only 1-bit Adam counts them."""
    ours = [engine.basic_optimizer for engine in engines if isinstance(engine.basic_optimizer, OneBitAdam)]
    return {"bytes_sent": sum(optimizer.take_bytes_sent() for optimizer in ours)} if ours else {}


def save(engine: Any, snapshot: Snapshot, name: str, world: World) -> None:
    """Put an engine's state into a snapshot's folder, for any number of ranks to go on from. Collective."""
    shards.write(snapshot, name, engine_state.pieces(engine, world), engine_state.facts(engine, world), world)


def load(engine: Any, folder: Path, world: World) -> None:
    """Put back what ``save`` wrote. Collective.

    Raises:
        HpcRlhfError: it was written for another model, or cannot be read by this number of ranks.
    """
    engine_state.prepare(engine, shards.read_facts(folder), folder, world)
    shards.read(folder, engine_state.pieces(engine, world), world)
    engine_state.settle(engine)
