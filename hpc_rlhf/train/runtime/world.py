"""The ranks of a stage: how they join, and how they communicate."""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.files import file_system_error
from hpc_rlhf.train.parallel.deepspeed_import import import_deepspeed
from hpc_rlhf.train.parallel.deepspeed_internals import disable_shared_memory_comm
from hpc_rlhf.train.runtime import messages
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.runtime.rendezvous import open_store
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

T = TypeVar("T")

# One rank may tokenize a large data set while the others wait for it.
CONTROL_TIMEOUT = timedelta(hours=12)
# Of other collective operations, where a spec sets none.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ParallelDims:
    """How the ranks of a stage are laid out: the size of each dimension of parallelism, outermost first.

    Neighbouring ranks differ in the last dimension, which communicates most.

    A new dimension is a new field. Ranks that differ in ``data`` have different samples; those that differ
    only in other dimensions work on the same samples, with the same random numbers.

    Attributes:
        data: ranks, or groups of ranks, with samples of their own.
        pipeline: stages that the layers are divided over.
        sequence: ranks that share the tokens of each packed row.
        tensor: ranks that share each layer.
    """

    data: int
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, ranks: int, tensor: int = 1, sequence: int = 1, pipeline: int = 1) -> ParallelDims:
        """The layout of a number of ranks.

        Raises:
            HpcRlhfError: they cannot be divided into groups of that size.
        """
        sizes = {"tensor_parallel": tensor, "sequence_parallel": sequence, "pipeline_parallel": pipeline}
        group = math.prod(sizes.values())
        if ranks % group:
            raise HpcRlhfError(
                f"{ranks} ranks cannot be divided into groups of {group}",
                where=[name for name, size in sizes.items() if size > 1][-1],
                hint=f"start a multiple of {group} ranks, {' x '.join(sizes)}",
            )
        return cls(ranks // group, pipeline, sequence, tensor)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, field.name) for field in fields(self))

    def coordinate(self, dim: str, rank: int) -> int:
        """A rank's place along a dimension."""
        size: int = getattr(self, dim)
        return rank // self._stride(dim) % size

    def group(self, dim: str, rank: int) -> list[int]:
        """The ranks that differ from one in at most this dimension, in its order."""
        stride = self._stride(dim)
        first = rank - self.coordinate(dim, rank) * stride
        return [first + place * stride for place in range(getattr(self, dim))]

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same part of a model, before ZeRO shards it."""
        return self.data * self.sequence

    def sharers(self, rank: int) -> list[int]:
        """The ranks that work on the same samples as one, in order, itself included."""
        stride = self._stride("data")
        first = rank - rank % stride
        return list(range(first, first + stride))

    @property
    def sample_owners(self) -> list[int]:
        """For each share of the samples, in order, one of the ranks that have its losses: those of the last stage."""
        return self.group("data", (self.pipeline - 1) * self._stride("pipeline"))

    def _stride(self, dim: str) -> int:
        names = [field.name for field in fields(self)]
        return math.prod(getattr(self, name) for name in names[names.index(dim) + 1 :])


@dataclass(frozen=True)
class World:
    """This process among the ranks: who it is, where its tensors are, and how it communicates.

    Attributes:
        rank: 0 <= rank < size.
        dims: how the ranks are laid out.
        device: where this rank's tensors are.
        control: a gloo group for small messages, which takes CPU tensors under any backend.
        sequence_group: of the ranks that share the tokens of each packed row; None if each rank has rows of its own.
    """

    rank: int
    dims: ParallelDims
    device: torch.device
    control: Any
    sequence_group: Any = None

    @property
    def size(self) -> int:
        return self.dims.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank works on."""
        return self.dims.coordinate("data", self.rank)

    @property
    def replica_rank(self) -> int:
        """This rank's place among those that hold the same part of a model."""
        return self.data_rank * self.dims.sequence + self.dims.coordinate("sequence", self.rank)

    def laid_out(self, tensor: int = 1, sequence: int = 1, pipeline: int = 1) -> World:
        """The same ranks, laid out by ``ParallelDims.of``. Collective."""
        dims, group = ParallelDims.of(self.size, tensor, sequence, pipeline), None
        if sequence > 1:
            groups = sorted({tuple(dims.group("sequence", rank)) for rank in range(self.size)})
            group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups])
        return replace(self, dims=dims, sequence_group=group)

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self.largest([number])[0]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks' numbers, elementwise."""
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [int(number) for number in tensor.tolist()]

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number summed over all samples, each once, in float64. All ranks pass the same keys."""
        owner = self.rank in self.dims.sample_owners
        tensor = torch.tensor(list(numbers.values()), dtype=torch.float64) * owner
        dist.all_reduce(tensor, group=self.control)
        return dict(zip(numbers, tensor.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Values are sent as JSON, so tuples come back as lists."""
        return messages.gather(value, self.control)

    def gather_data(self, value: T) -> list[T]:
        """The value of one rank for each share of the samples, in order of the shares, on every rank."""
        values = self.gather(value)
        return [values[rank] for rank in self.dims.sample_owners]

    def gather_sharers(self, value: T) -> list[T]:
        """The values of the ranks that work on this rank's samples, in rank order. Collective over all ranks."""
        values = self.gather(value)
        return [values[rank] for rank in self.dims.sharers(self.rank)]

    def on_main(self, make: Callable[[], T]) -> T:
        """Rank 0's result, on every rank, as ``gather`` returns values. WorkCancelled and user errors are raised on
        every rank, too."""
        outcome = _outcome(make) if self.is_main else [None, None]
        return _result(messages.broadcast(outcome, self.control))

    def on_each(self, make: Callable[[], T]) -> list[T]:
        """Every rank's result, in rank order, on every rank; errors as in ``on_main``."""
        return [_result(outcome) for outcome in self.gather(_outcome(make))]


def _outcome(make: Callable[[], Any]) -> list[Any]:
    """What a function returns, or what it raises that every rank should raise."""
    try:
        return [make(), None]
    except WorkCancelled:
        return [None, []]
    except HpcRlhfError as error:
        return [None, (error.message, error.where, error.hint, error.exit_code)]
    except Exception as error:
        refused = file_system_error(error)
        if refused is None:
            raise
        hint = "fix it, or free some space, and run the stage again"
        return [None, (f"the file system refused: {refused}", socket.gethostname(), hint, RUN_FAILED)]


def _result(outcome: list[Any]) -> Any:
    result, error = outcome
    if error == []:
        raise WorkCancelled
    if error is not None:
        raise HpcRlhfError(*error)
    return result


def join(expected_ranks: int, timeout: timedelta = COLLECTIVE_TIMEOUT, secret: bytes = b"") -> World:
    """Join the process group that the launcher started.

    Args:
        timeout: of collective operations, except those on ``World.control``.
        secret: by which the ranks recognize each other.

    Raises:
        HpcRlhfError: the launcher started another number of ranks than the plan has, or another process poses as one
            of them.
    """
    rank, size, local_rank = launcher_ranks()
    if size != expected_ranks:
        raise HpcRlhfError(
            f"{size} ranks were started where the plan has {expected_ranks}",
            where=socket.gethostname(),
            hint="submit again, so that the plan and the allocation agree",
            exit_code=RUN_FAILED,
        )
    # CPUs compute slowly with subnormal numbers, which the tails of a softmax and Adam's second moments reach. Threads
    # inherit this setting when torch starts them.
    torch.set_flush_denormal(True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Slurm may show a task only its own GPU, or all of its node.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    import deepspeed

    disable_shared_memory_comm()
    # DeepSpeed makes further groups, without a timeout; torch then takes its defaults.
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    backend, method = "nccl" if on_gpu else "gloo", None
    if not dist.is_initialized():  # a program of the user's may make several engines
        store = open_store(secret, rank, size, timeout)
        method = f"joined-{secrets.token_hex(4)}://"
        register_rendezvous_handler(method.partition(":")[0], lambda *_, **__: iter([(store, rank, size)]))
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, init_method=method, verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return World(rank, ParallelDims(size), device, control)


def leave() -> None:
    torch.set_flush_denormal(False)
    if dist.is_initialized():
        dist.destroy_process_group()
