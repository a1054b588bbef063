"""The ranks of a stage: who they are, and what they tell each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.runtime.stop_signals import Interrupted

T = TypeVar("T")

# One rank may tokenise a large data set while the others wait for it.
CONTROL_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    Neighbouring ranks that share every layer (tensor parallelism) are a group; without it each rank is one. A group
    has the same samples and random numbers on all its ranks, so what goes by samples goes by ``data_rank`` and
    ``data_size``.

    Attributes:
        rank: 0 <= rank < size.
        device: where this rank's tensors live.
        control: a gloo group for small messages, which works on CPU tensors under any backend.
        tensor_parallel: ranks of a group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any
    tensor_parallel: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This rank's group."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """Number of groups."""
        return self.size // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        """This rank's place in its group."""
        return self.rank % self.tensor_parallel

    def grouped(self, tensor_parallel: int) -> World:
        """The same ranks in groups that share layers.

        Raises:
            HpcRlhfError: they do not come out even.
        """
        if self.size % tensor_parallel:
            raise HpcRlhfError(
                f"{self.size} ranks are no whole groups of {tensor_parallel}",
                where="tensor_parallel",
                hint="start a multiple of tensor_parallel ranks",
            )
        return replace(self, tensor_parallel=tensor_parallel)

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor.item())

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number summed over all samples, those of a group counted once, in float64; every rank gives the same keys."""
        tensor = torch.tensor(list(numbers.values()), dtype=torch.float64) * (self.tensor_rank == 0)
        dist.all_reduce(tensor, group=self.control)
        return dict(zip(numbers, tensor.tolist(), strict=True))

    def gather(self, thing: T) -> list[T]:
        """Every rank's thing, in rank order, on every rank."""
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def gather_data(self, thing: T) -> list[T]:
        """Every group's thing, in the groups' order, on every rank."""
        return self.gather(thing)[:: self.tensor_parallel]

    def gather_group(self, thing: T) -> list[T]:
        """What each rank of this rank's group has, in rank order. Collective over all ranks."""
        first = self.data_rank * self.tensor_parallel
        return self.gather(thing)[first : first + self.tensor_parallel]

    def on_main(self, make: Callable[[], T]) -> T:
        """Rank 0's result, on every rank. Interrupted, or an error that a person can mend, is raised on every rank."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except Interrupted:
                answer[1] = ()
            except HpcRlhfError as error:
                answer[1] = (error.message, error.where, error.hint, error.exit_code)
            except OSError as error:
                hint = "mend it, or make room, and run the stage again"
                answer[1] = (f"the file system refused: {error}", socket.gethostname(), hint, RUN_FAILED)
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] == ():
            raise Interrupted
        if answer[1] is not None:
            raise HpcRlhfError(*answer[1])
        return answer[0]


def join(expected_ranks: int) -> World:
    """Join the process group that the launcher started.

    Raises:
        HpcRlhfError: the launcher started another number of ranks than the plan has.
    """
    rank, size, local_rank = launcher_ranks()
    if size != expected_ranks:
        raise HpcRlhfError(
            f"{size} ranks were started where the plan has {expected_ranks}",
            where=socket.gethostname(),
            hint="submit again, so that the plan and the allocation agree",
            exit_code=RUN_FAILED,
        )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Slurm may show a task only its own GPU, or all of its node.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce for CPU ranks at its first start, which takes a compiler
    # and most of a minute, and leaves the others spinning for ever when one rank dies; gloo raises.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
    )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
