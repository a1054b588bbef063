"""Responses for chat and serve by a stand-in for vLLM: requests join, leave and end, and a failure stays one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.backend import Sampling
from hpc_rlhf.train.rollout.in_process.open_batch import Request
from hpc_rlhf.train.rollout.vllm import open_batch
from hpc_rlhf.train.rollout.vllm.open_batch import VllmBatch
from hpc_rlhf.train.rollout.vllm.server import Server
from tests.train import tiny
from tests.train.rollout.test_vllm_server import interpreter

Make = Callable[[str], VllmBatch]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(behaviour: str) -> VllmBatch:
        rollout = RolloutSpec(engine="vllm", python=interpreter(tmp_path, behaviour))
        return VllmBatch(tmp_path, torch.float32, tiny.EOS, rollout, 0.9)

    return made


def request(token: int, length: int) -> Request:
    return Request([token], length, Sampling(), (token,))


def test_requests_join_leave_and_end_at_any_step(make: Make) -> None:
    batch = make("answers")
    assert batch.budget == 64
    assert batch.advance() == []
    first, second, unwanted, late = request(7, 3), request(8, 1), request(9, 5), request(10, 1)
    for each in (first, second, unwanted):
        batch.add(each)
    assert batch.advance() == [first, second, unwanted]
    assert [batch.is_finished(each) for each in (first, second, unwanted)] == [False, True, False]
    batch.remove(unwanted)
    batch.remove(second)  # it has ended
    batch.add(late)
    assert batch.advance() == [first, late]
    assert batch.advance() == [first]
    assert batch.advance() == []
    assert [each.tokens for each in (first, second, unwanted, late)] == [[7] * 3, [8], [9], [10]]
    batch.add(request(11, 3))
    batch.clear()
    assert batch.advance() == []


def test_an_interrupted_step_is_completed_by_the_next(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    batch, first, second = make("answers"), request(7, 3), request(8, 2)
    batch.add(first)
    with monkeypatch.context() as patched:
        patched.setattr(Server, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.advance()
    batch.remove(first)
    batch.add(second)
    assert [batch.advance(), batch.advance()] == [[second], [second]]
    assert (first.tokens, second.tokens) == ([], [8, 8])


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("dies", "its process was killed by SIGKILL.* a last word"), ("hangs", "it showed no sign of life for 1 s")],
)
def test_a_failed_engine_fails_every_request(
    make: Make, behaviour: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_batch, "STEP_SECONDS", 1.0)
    batch = make(behaviour)
    for _ in range(2):
        batch.add(request(7, 3))
        with pytest.raises(HpcRlhfError, match=f"vLLM failed: {message}") as failed:
            batch.advance()
        assert failed.value.exit_code == RUN_FAILED
        batch.clear()


def test_an_engine_that_does_not_start_is_an_error(make: Make) -> None:
    with pytest.raises(HpcRlhfError, match="vLLM did not start: ValueError: no such model"):
        make("refuses")
