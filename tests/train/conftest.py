"""Fixtures for training in this process: one thread, and plain optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.small_disk import mounted

if TYPE_CHECKING:
    from tests.train.ppo_trainers import Steps


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with mounted(tmp_path / "small", "24m") as place:
        yield place
