"""The only file that touches DeepSpeed's private names.

``tests/train/parallel/test_deepspeed_internals.py`` lists each of them and fails when DeepSpeed changes one. Its public
interface (``initialize``, an engine's ``backward``, ``step``, ``was_step_applied``, …) is used directly elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

# State of a dynamic loss scale; which of these exist depends on the scaler.
SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTER_FIELDS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def disable_shared_memory_comm() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPU ranks, which takes a compiler and most of a
    minute, and with which the other ranks spin forever when one dies; gloo raises."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# Parameters


def is_zero3(parameter: Any) -> bool:
    """True if ZeRO-3 partitions the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def local_shard(parameter: Any) -> Tensor:
    """This rank's shard of a ZeRO-3 parameter, flat and perhaps padded; any other parameter whole."""
    shard: Tensor = parameter.ds_tensor if is_zero3(parameter) else parameter
    return shard.detach()


def set_local_shard(parameter: Any, values: Tensor) -> None:
    """Change what ``local_shard`` returns. ZeRO-3 gathers small parameters right after an optimizer step; such a copy
    would be used instead of the new values, so it is dropped."""
    if is_zero3(parameter):
        parameter.partition()
    with torch.no_grad():
        local_shard(parameter).copy_(values)


def full_numel(parameter: Any) -> int:
    """Elements of a parameter before ZeRO-3 partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before ZeRO-3 flattened it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def mark_split(tensor: Tensor) -> None:
    """Tell DeepSpeed that this rank holds only a shard of a parameter or gradient, for the gradient norm."""
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]


def is_split(parameter: nn.Parameter) -> bool:
    """True if tensor parallelism splits the parameter over the ranks of a group."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


# Tensor parallelism


def tensor_group(ways: int) -> Any:
    """This rank's process group of neighbouring ranks that share layers. Collective."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(ways)
    return groups.get_tensor_model_parallel_group()


def skip_autotp(model: nn.Module) -> None:
    """Tell ``deepspeed.initialize`` that the model's layers are already split, or are not to be."""
    model.ds_autotp_parsed = True  # type: ignore[assignment]


def skip_input_check(engine: Any) -> None:
    """Do not compare the first inputs of a tensor-parallel group: the ranks would send each other pickles for that."""
    if (hook := getattr(engine, "first_dataloader_check", None)) is not None:
        hook.remove()
        engine.first_dataloader_check = None


def replica_group() -> Any:
    """The process group of the ranks that hold the same shards of the layers."""
    from deepspeed.utils import groups

    return groups.get_data_parallel_group()


# Engines


def has_unfused_wrapper(engine: Any) -> bool:
    """True for half precision without ZeRO, where DeepSpeed wraps the optimizer in FP16_UnfusedOptimizer."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return isinstance(engine.optimizer, FP16_UnfusedOptimizer)


def discard_allocation_step(engine: Any) -> None:
    """Half precision without ZeRO: undo the step on zero gradients by which DeepSpeed allocates Adam's state.

    That step decays weights, and Adam counts it: the bias corrections would be one step ahead, and the first
    updates a quarter too small.
    """
    if has_unfused_wrapper(engine):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


def check_overflow_by_norm(engine: Any) -> None:
    """Half precision without ZeRO: check only the gradient norm for overflow, not every gradient as well.

    DeepSpeed skips a step whose norm is not finite. The norm is the same on all ranks, because their
    gradients have been averaged.
    """
    if hasattr(engine.optimizer, "overflow_checker"):
        engine.optimizer.overflow_checker.check = bool


def disable_gradient_averaging(engine: Any) -> None:
    """Leave each rank its own gradients; the optimizer averages them."""
    engine.enable_backward_allreduce = False


def skip_reduction_alone(engine: Any) -> None:
    """Keep DeepSpeed without ZeRO from copying all gradients to sum them over one rank."""
    if engine.dp_world_size == 1:
        engine.allreduce_no_retain = lambda *_, **__: None


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed wraps."""
    return engine.basic_optimizer


def keeps_grad_norm(engine: Any) -> bool:
    """False for float32 without ZeRO: DeepSpeed clips by torch then and does not keep the norm."""
    return hasattr(engine.optimizer, "_global_grad_norm")


def tensor_parallel_group(engine: Any) -> Any:
    """The process group of the ranks that share layers; None without tensor parallelism."""
    return None if engine.mpu is None else engine.mpu.get_tensor_model_parallel_group()


def unapplied_loss_scale(engine: Any) -> float:
    """The factor that the caller must multiply float16 losses with.

    Without ZeRO, DeepSpeed 0.19 divides the gradients by the loss scale in its step, but its engine never multiplies
    the loss: small gradients would vanish, and the rest be too small for Adam's epsilon and clipping.
    """
    return float(engine.optimizer.loss_scale) if has_unfused_wrapper(engine) else 1.0


# Pipelines


def pipeline_module(stage: Any, data: int, stages: int, tensor: int, tied: nn.Parameter | None) -> Any:
    """A stage of a pipeline as ``deepspeed.initialize`` takes it. Collective.

    Args:
        stage: has a method ``pass_on`` that computes a micro-batch.
        data, stages, tensor: sizes of the dimensions of the ranks' layout, outermost first.
        tied: a weight that the first and the last stage both have, whose gradients are summed.
    """
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology

    class Stage(PipelineModule):
        def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
            return self.tied_over

    with redirect_stdout(io.StringIO()):  # it prints its layers
        topology = ProcessTopology(axes=["data", "pipe", "model"], dims=[data, stages, tensor])
        module = Stage([stage.pass_on] * stages, topology=topology, partition_method="uniform", dynamic_shape=True)
    module.stage, module.tied_over = stage, []
    if tied is not None:
        ends = [[ranks[0], ranks[-1]] for ranks in topology.get_axis_comm_lists("pipe")]
        group, _ = torch.distributed.new_subgroups_by_enumeration(ends)
        if module.stage_id in (0, stages - 1):
            module.tied_over = [(tied, group)]
            tied.ds_pipe_replicated = module.stage_id > 0  # type: ignore[attr-defined]
    return module


def is_copy(parameter: nn.Parameter) -> bool:
    """True if an earlier stage of the pipeline has the parameter, too."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def model_group(engine: Any) -> Any:
    """The process group of the ranks that a pipeline's model is divided over."""
    return engine.grid.get_model_parallel_group()


def run_pipeline(engine: Any, passes: int) -> None:
    """An optimizer step on ``passes`` micro-batches, which the stages hold themselves. Collective."""
    engine.micro_batches = passes
    nothing = torch.zeros((), device=engine.device)
    engine.train_batch(repeat((nothing, nothing)))


def trained_model(engine: Any) -> Any:
    """The model in an engine; in a pipeline, this rank's stage of it."""
    return getattr(engine.module, "stage", engine.module)


# Optimizer state


@dataclass(frozen=True)
class Fragment:
    """The part of a trained parameter's float32 weight that this rank's optimizer steps.

    Attributes:
        start: index of the fragment's first element in the flattened parameter.
        stepped: the tensor that the inner optimizer steps and keeps its state by.
        span: where the fragment lies in it, flattened.
        replicated: every rank has this fragment.
        copy: see ``is_copy``.
        parameter: the trained parameter.
    """

    name: str
    start: int
    stepped: Tensor
    span: slice
    parameter: nn.Parameter
    replicated: bool = False
    copy: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's part of ``stepped``, or of a moment of the same shape: (elements,), a view."""
        return tensor.detach().view(-1)[self.span]


def fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments of all trained parameters on this rank."""
    optimizer = engine.optimizer
    trained = [(name, p) for name, p in trained_model(engine).named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _zero3_fragments(optimizer, trained)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _zero12_fragments(optimizer, trained)
    else:
        masters = dict(_masters(engine))
        for name, parameter in trained:
            copy = is_copy(parameter)
            yield Fragment(name, 0, masters[parameter], slice(None), parameter, replicated=True, copy=copy)


def _zero3_fragments(optimizer: Any, trained: list[tuple[str, Any]]) -> Iterator[Fragment]:
    rank = torch.distributed.get_rank()
    for name, parameter in trained:
        group, offset, held = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * held
        count = min(held, parameter.ds_numel - start)  # the last rank's shard may be padded
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Fragment(name, start, flat, slice(offset, offset + count), parameter)


def _zero12_fragments(optimizer: Any, trained: list[tuple[str, Any]]) -> Iterator[Fragment]:
    for name, parameter in trained:
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # other ranks have all of it
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        held = mapping.hp_fragment_address
        span = slice(held.start, held.start + held.numel)
        start = mapping.lp_fragment_address.start
        yield Fragment(name, start, flat, span, parameter, copy=is_copy(parameter))


def _masters(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Without ZeRO: the model's parameters, and the float32 tensors that the optimizer steps for them."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        yield from ((p, p) for p in engine.module.parameters() if p.requires_grad)
        return
    for half, single in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(half, single, strict=True)


def stepped_tensors(engine: Any) -> list[Tensor]:
    """The tensors that the inner optimizer steps and keeps its state by."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [master for _, master in _masters(engine)]


def copy_masters_to_model(engine: Any) -> None:
    """Set the model's weights to the float32 ones that the optimizer steps. Collective."""
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
            for single, flat, shards in groups:
                flat.data.copy_(single.data)
                for shard, values in zip(shards, optimizer.unflatten(flat, shards), strict=True):
                    shard.data = values.data
            optimizer.checkpoint_event_epilogue()
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            optimizer.update_lp_params()
        else:
            for parameter, master in _masters(engine):
                parameter.copy_(master)


def _scaler(engine: Any) -> Any:
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return config or getattr(engine.optimizer, "loss_scaler", None)


def numbers(engine: Any) -> dict[str, dict[str, Any]]:
    """The state of the loss scale and the engine's counters, as JSON."""
    scaler = _scaler(engine)
    return {
        "scale": {name: getattr(scaler, name) for name in SCALE_FIELDS if hasattr(scaler, name)},
        "counters": {name: getattr(engine, name) for name in COUNTER_FIELDS},
    }


def restore_numbers(engine: Any, scale: dict[str, Any], counters: dict[str, int]) -> None:
    for owner, values in ((_scaler(engine), scale), (engine, counters)):
        for name, value in values.items():
            setattr(owner, name, value)
