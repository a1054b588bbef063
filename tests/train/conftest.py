"""Fixtures for training in this process: one thread, and a world of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from hpc_rlhf.train.runtime.world import ParallelDims, World

if TYPE_CHECKING:
    from tests.train.ppo_trainers import Steps


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """This process alone, joined by gloo without a launcher or a port."""
    meeting: Path = tmp_path_factory.mktemp("world") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield World(0, ParallelDims(1), torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Steps]:
    """Replaces DeepSpeed's optimizer steps by plain ones with a learning rate."""
    from hpc_rlhf.train.models import engine as engines
    from tests.train.ppo_trainers import Steps

    def put(lr: float) -> Steps:
        fake = Steps(lr)
        monkeypatch.setattr(engines, "optimizer_step", fake)
        return fake

    return put
