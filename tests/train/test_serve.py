"""hpc-rlhf serve as a process: what it prints, how it ends, and what it becomes where vLLM is installed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.train import serve
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.plain_turns import PLAIN
from hpc_rlhf.train.server.access import VllmGuard
from tests.launch.specs import make_spec
from tests.train import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("serve") / "run")
    run.path.mkdir()
    run.job_yaml.write_text(dump_spec(make_spec(run.path)))
    folder = run.stage("sft").model
    export(tiny.causal("llama", vocab_size=300), tiny.tokenizer(), folder, is_main=True)
    manifest.write(folder, {"stage": "sft"})
    return run


@contextmanager
def serving(run: RunDir, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run.path), "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            yield server
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_what_it_prints_reaches_it_and_a_signal_ends_it_at_once(run: RunDir, ended_by: signal.Signals) -> None:
    port = free_port()
    with serving(run, port) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(2)]
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        said = subprocess.run(["bash", "-c", "".join(lines)], capture_output=True, text=True, timeout=60).stdout
        (token,) = re.findall("OPENAI_API_KEY=(.*)", lines[0])
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token) as client:
            messages: Any = [{"role": "user", "content": "Hi"}]
            chunks = client.chat.completions.create(model="sft", messages=messages, stream=True)
            next(iter(chunks))
            server.send_signal(ended_by)
            code = server.wait(30)
    assert '"object":"chat.completion"' in said
    assert token not in arguments, "everybody on the machine sees them"
    assert not re.search(f"curl.*{token}", lines[1])
    assert code == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[ended_by]
    serve.listen("127.0.0.1", port).close()


@pytest.mark.slow
def test_a_port_in_use_is_reported_before_the_model_is_loaded(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving(run, port) as server:
            _, errors = server.communicate(timeout=120)
    assert server.returncode == 1
    assert errors == (
        f"error: 127.0.0.1:{port}: something else listens there\n  hint: choose another port with --port\n"
    )


def test_an_address_of_another_machine_is_reported() -> None:
    with pytest.raises(serve.HpcRlhfError, match=r"192\.0\.2\.1:8000: this machine cannot listen there"):
        serve.listen("192.0.2.1", 8000)


@pytest.mark.parametrize("is_old", [False, True])
def test_vllm_gets_the_guard_and_the_key_but_not_as_an_argument(
    run: RunDir, is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.stage("sft").model
    if is_old:  # without a chat template
        tiny.tokenizer().save_pretrained(str(tmp_path))
        folder = tmp_path
    started: list[tuple[list[str], dict[str, str]]] = []

    def execute(program: str, arguments: list[str]) -> None:
        started.append((arguments, dict(os.environ)))
        raise SystemExit

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    with pytest.raises(SystemExit):
        serve.serve(folder, "sft", "127.0.0.1", 8000, "secret", lambda: None)
    ((arguments, environment),) = started
    assert "vllm.entrypoints.openai.api_server" in arguments
    assert arguments[arguments.index("--middleware") + 1] == f"{VllmGuard.__module__}.{VllmGuard.__name__}"
    assert "secret" not in arguments
    assert environment["VLLM_API_KEY"] == "secret"
    assert any(PLAIN in argument for argument in arguments) == is_old

    async def app(*_: object) -> None: ...

    guard = VllmGuard(app)
    headers = [(b"host", b"localhost:8000"), (b"authorization", b"Bearer secret")]
    assert guard.objection({"path": "/reset_prefix_cache", "headers": headers}) is None
    for other in (headers[:1], [(b"host", b"evil.example"), headers[1]]):
        assert guard.objection({"path": "/reset_prefix_cache", "headers": other}) is not None
