"""A server of the vLLM backend, by a stand-in: what a rank asks it, how it fails, and that it ends with the rank."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.vllm import server
from hpc_rlhf.train.rollout.vllm.engine import RESTARTS, VllmEngine
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.rollout.stand_in_vllm import interpreter
from tests.train.worlds import on_ranks

CHECKOUT = Path(__file__).parents[3]
GREEDY = GenerationRequest([[7, 8], [9], [7, 8]], 3, tiny.EOS, Sampling(greedy=True))


def engine(folder: Path, world: World, behaviour: str, tensor_parallel: int = 1, **more: Any) -> VllmEngine:
    python = world.on_main(lambda: interpreter(folder, behaviour))
    spec = RolloutSpec(engine="vllm", python=python, tensor_parallel=tensor_parallel)
    return VllmEngine(
        tiny.causal("llama"), world, spec, folder / "engine", 40, "attempt", "stages.grpo.rollout", **more
    )  # fmt: skip


def test_responses_come_with_log_probabilities_and_equal_greedy_requests_are_made_once(
    tmp_path: Path, world: World
) -> None:
    backend = engine(tmp_path, world, "answers")
    backend.sync_weights(backend.model)
    rollout = backend.generate(GREEDY)
    assert rollout.responses == [[7] * 3, [9] * 3, [7] * 3]
    assert rollout.log_probs is not None
    torch.testing.assert_close(rollout.log_probs, torch.full((9,), -2.0))
    first = backend.version
    backend.sync_weights(backend.model)
    assert backend.version != first
    backend.close()


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_each_group_of_ranks_has_a_server_for_its_share_of_the_prompts(tmp_path: Path, tensor_parallel: int) -> None:
    def work(world: World) -> Any:
        backend = engine(tmp_path, world, "answers", tensor_parallel)
        backend.sync_weights(backend.model)
        own = [[10 + world.rank], [20 + world.rank]]
        rollout = backend.generate(GenerationRequest(own, 1, tiny.EOS, Sampling(), [tuple(each) for each in own]))
        backend.close()
        return rollout.responses, rollout.response_log_probs

    asked = -2.0 * tensor_parallel
    assert on_ranks(4, work) == [([[10 + rank], [20 + rank]], [[asked], [asked]]) for rank in range(4)]


@pytest.mark.parametrize("behaviour", ["dies", "hangs", "garbles", "forgets", "babbles", "stale"])
def test_a_failing_server_is_started_and_asked_again(
    tmp_path: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if behaviour == "hangs":
        monkeypatch.setattr(server, "SILENCE_SECONDS", 1.0)

    def work(world: World) -> Any:
        backend = engine(tmp_path, world, f"{behaviour}-once")
        backend.sync_weights(backend.model)
        rollout = backend.generate(GenerationRequest([[7 + world.rank]] * 2, 3, tiny.EOS, Sampling(greedy=True)))
        backend.close()
        return rollout.responses, backend.restarts

    assert on_ranks(2, work) == [([[7] * 3] * 2, 1), ([[8] * 3] * 2, 1)]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "vLLM did not start: ValueError: no such model as"),
        ("dies", f"vLLM failed: its process was killed by SIGKILL.*; its last line: a last word.*{RESTARTS} restarts"),
        ("stale", "vLLM failed: it answered with weights another, not with attempt/1"),
    ],
)
def test_a_server_that_fails_again_and_again_ends_the_stage(
    tmp_path: Path, world: World, behaviour: str, message: str
) -> None:
    backend = engine(tmp_path, world, behaviour)

    def roll_out() -> None:
        backend.sync_weights(backend.model)
        backend.generate(GREEDY)

    with pytest.raises(HpcRlhfError, match=message) as failed:
        roll_out()
    assert failed.value.where == "stages.grpo.rollout"
    assert (failed.value.exit_code == RUN_FAILED) == (behaviour != "refuses")
    backend.close()


def test_a_stop_does_not_wait_for_the_server_to_start(tmp_path: Path, world: World) -> None:
    backend = engine(tmp_path, world, "sleeps", should_stop=lambda: True)
    with pytest.raises(RolloutCancelled):
        backend.sync_weights(backend.model)
    backend.close()


def test_a_server_and_what_it_started_end_with_a_killed_rank(tmp_path: Path) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", "from hpc_rlhf.train.rollout.vllm.server import Server; import sys, time\n"
         "server = Server(sys.argv[1], {}, 64, {})\nwhile True: time.sleep(1)", interpreter(tmp_path, "sleeps")],
        cwd=CHECKOUT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert rank.stderr is not None
    line = next(line for line in rank.stderr if line.startswith("sleeping"))
    pids = [int(word) for word in line.split()[1:]]
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    while any(running(pid) for pid in pids):
        time.sleep(0.1)
    rank.stderr.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
