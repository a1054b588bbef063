"""A server of the vLLM backend, by a stand-in: what a rank asks it, how it fails, and that it ends with the rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.vllm import server
from hpc_rlhf.train.rollout.vllm.engine import RESTARTS, VllmEngine
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny
from tests.train.rollout.stand_in_vllm import interpreter
from tests.train.worlds import on_ranks

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[3]
GREEDY = GenerationRequest([[7, 8], [9], [7, 8]], 3, tiny.EOS, Sampling(greedy=True))


def engine(folder: Path, world: World, behaviour: str, nodes: int = 1, **fields: Any) -> VllmEngine:
    python = world.on_main(lambda: interpreter(folder, behaviour))
    spec = RolloutSpec(engine="vllm", python=python, **fields)
    slurm = SlurmSpec(nodes=nodes, gpus_per_node=0, ranks_per_node=world.size // nodes)
    return VllmEngine(
        tiny.causal("llama"), world, spec, folder / "engine", 40, "attempt", "stages.grpo.rollout", slurm
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


@pytest.mark.parametrize(
    ("servers", "fields"),
    [
        (4, {}),
        (2, {"tensor_parallel": 2}),
        (1, {"tensor_parallel": 4}),
        (2, {"placement": {"separate": {"gpus_per_node": 1}}}),
        (2, {"tensor_parallel": 2, "placement": {"separate": {"gpus_per_node": 2}}}),
        (4, {"placement": {"separate": {"gpus_per_node": 2}}}),
        (2, {"placement": {"separate": {"nodes": 1}}}),
    ],
)
def test_each_server_answers_its_share_of_the_prompts(tmp_path: Path, servers: int, fields: dict[str, Any]) -> None:
    """Four ranks on two nodes."""

    def work(world: World) -> Any:
        backend = engine(tmp_path, world, "answers", nodes=2, **fields)
        backend.sync_weights(backend.model)
        own = [[10 + world.rank], [20 + world.rank]]
        rollout = backend.generate(GenerationRequest(own, 1, tiny.EOS, Sampling(), [tuple(each) for each in own]))
        backend.close()
        return rollout.responses, rollout.response_log_probs

    asked = -8.0 / servers
    assert on_ranks(4, work) == [([[10 + rank], [20 + rank]], [[asked], [asked]]) for rank in range(4)]


@pytest.mark.parametrize("placement", ["colocated", {"separate": {"nodes": 1}}])
@pytest.mark.parametrize("behaviour", ["dies", "hangs", "garbles", "forgets", "babbles", "stale"])
def test_a_failing_server_is_started_and_asked_again(
    tmp_path: Path, behaviour: str, placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if behaviour == "hangs":
        monkeypatch.setattr(server, "SILENCE_SECONDS", 1.0)

    def work(world: World) -> Any:
        backend = engine(tmp_path, world, f"{behaviour}-once", placement=placement)
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
    backend = engine(tmp_path, world, "sleeps")
    backend.should_stop = lambda: True
    with pytest.raises(RolloutCancelled):
        backend.sync_weights(backend.model)
    backend.close()


RANK = """
import json, sys, time
from hpc_rlhf.train.rollout.vllm.server import Server
server = Server(json.loads(sys.argv[1]), {}, 64, {})
while True: time.sleep(1)
"""


def rank_with(program: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A rank with a server that sleeps."""
    return subprocess.Popen(
        [sys.executable, "-c", RANK, json.dumps(program)],
        cwd=CHECKOUT, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def kill(rank: subprocess.Popen[str]) -> None:
    """Kill a rank once its server sleeps, and wait for the end of that and of what it started."""
    assert rank.stderr is not None
    line = next(line for line in rank.stderr if line.startswith("sleeping"))
    pids = [int(word) for word in line.split()[1:]]
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    while any(running(pid) for pid in pids):
        time.sleep(0.1)
    rank.stderr.close()


def test_a_server_and_what_it_started_end_with_a_killed_rank(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "sleeps")
    kill(rank_with(["start", python]))
    kill(rank_with(["bridge", str(tmp_path), "0", python, "1"]))


def test_a_server_on_another_node_ends_with_its_rank_and_its_agent_when_slurm_ends_that(tmp_path: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-m", "hpc_rlhf.train.rollout.vllm.agent", str(tmp_path), "0"])
    address = tmp_path / "agent-0.json"
    while not address.exists():
        time.sleep(0.1)
    assert address.stat().st_mode & 0o777 == 0o600
    at = json.loads(address.read_text())
    with socket.create_connection((at["address"], at["port"])) as stranger:
        stranger.sendall(b"\0" * 64)
    with pytest.raises(AuthenticationError):
        Client((at["address"], at["port"]), authkey=b"a guess")
    bridge = ["bridge", str(tmp_path), "0", interpreter(tmp_path, "sleeps"), "1"]
    for _ in range(2):  # a rank that is started again, as a server is
        kill(rank_with(bridge, SUBMITIT_EXECUTOR="slurm"))
    rank = rank_with(bridge, SUBMITIT_EXECUTOR="slurm")
    assert rank.stderr is not None
    next(line for line in rank.stderr if line.startswith("sleeping"))
    agent.send_signal(signal.SIGTERM)
    agent.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    assert agent.poll() is None, "the rank is saving"
    rank.kill()
    rank.wait()
    rank.stderr.close()
    assert agent.wait(30) == 0
    idle = subprocess.Popen([sys.executable, "-m", "hpc_rlhf.train.rollout.vllm.agent", str(tmp_path), "1"])
    while not (tmp_path / "agent-1.json").exists():
        time.sleep(0.1)
    idle.send_signal(signal.SIGTERM)
    assert idle.wait(30) == 0


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
