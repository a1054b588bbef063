"""hpc-rlhf serve with the real server: it responds as chat does, with the prompt format of training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.models.export import export
from tests.launch.specs import make_spec
from tests.train import tiny

pytestmark = pytest.mark.slow

TURNS = [("system", "Be brief."), ("human", " Hi "), ("assistant", "Hello."), ("human", "What colour is snow?")]
ROLES = {"human": "user", "assistant": "assistant", "system": "system"}
MESSAGES = [{"role": ROLES[role], "content": text} for role, text in TURNS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("serve") / "run")
    run.path.mkdir()
    run.job_yaml.write_text(dump_spec(make_spec(run.path)))
    folder = run.stage("sft").model
    export(tiny.causal("llama", vocab_size=300), tiny.tokenizer(), folder, is_main=True)
    manifest.write(folder, {"stage": "sft"})
    return run


def test_a_server_responds_as_chat_does(run: RunDir) -> None:
    port = free_port()
    command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run.path), "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(f"curl http://127.0.0.1:{port}/v1/chat/completions")
        whole, pieces = ask(port, stream=False), ask(port, stream=True)
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(30)
    streamed = "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        for line in pieces.splitlines()
        if line.startswith("data: {")
    )
    said = "".join(ChatModel(run.stage("sft").model).stream(TURNS, 12, 0.0, seed=0))
    # Chat does not show a partial character at the end.
    half = "\N{REPLACEMENT CHARACTER}"
    assert json.loads(whole)["choices"][0]["message"]["content"].rstrip(half).strip() == said
    assert streamed.rstrip(half).strip() == said
    assert code == 130


def ask(port: int, stream: bool) -> str:
    body = {"model": "sft", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": stream}
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_a_port_in_use_is_reported(run: RunDir) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run.path), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"if port {port} is taken, choose another with --port" in done.stderr
