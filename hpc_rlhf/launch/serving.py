"""Serve a finished model over the OpenAI API, on this machine or in a Slurm job."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates, rank_python
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.load import read_spec

LOCALHOST = "127.0.0.1"
_POLL = 0.5
_NEEDS = ("fastapi", "uvicorn", "openai")


def request(name: str, port: int) -> str:
    """A command that sends the model a message."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    header = "-H 'Content-Type: application/json'"
    return f"curl http://{LOCALHOST}:{port}/v1/chat/completions {header} -d {shlex.quote(body)}"


def serve_here(name: str, folder: Path, host: str, port: int, ready: Callable[[], object]) -> None:
    """Serve until interrupted, and call ``ready`` once the server responds.

    Raises:
        HpcRlhfError: the server is not installed, or exits by itself.
    """
    missing = [module for module in _NEEDS if not find_spec(module)]
    if missing and not find_spec("vllm"):
        raise HpcRlhfError(
            f"serving needs {', '.join(missing)}", hint="pip install 'hpc-rlhf[serve]', or vllm on a machine with GPUs"
        )
    command = safe_path.module(*_arguments(name, folder, host, port))
    server = subprocess.Popen(command, stdout=sys.stderr)  # its log is not data
    try:
        while not _answers(host, port):
            if server.poll() is not None:
                break
            time.sleep(_POLL)
        else:
            ready()
        if server.wait():
            hint = f"its output is above; if port {port} is taken, choose another with --port"
            raise HpcRlhfError(
                f"the server exited with code {server.returncode}", where=str(folder), hint=hint, exit_code=RUN_FAILED
            )
    finally:
        server.terminate()
        server.wait()


def serve_as_job(
    run: RunDir, name: str, stage: str, folder: Path, port: int, say: Callable[[str], object]
) -> tuple[str, str]:
    """Submit a job that serves on one node of the stage's kind, wait until it runs, and return its id and node.
    ``say`` is called with progress messages.

    Raises:
        HpcRlhfError: this user may not act on the run, Slurm rejects the job, or it ends before it runs.
    """
    acting.check(run)
    plan = make_plan(read_spec(run.job_yaml))
    (planned,) = [job for job in plan.jobs if job.stage == stage]
    job = replace(planned, job_name=f"{plan.name}.serve", slurm=planned.slurm.model_copy(update={"nodes": 1}))
    command = f"{rank_python(job)} {shlex.join(_arguments(name, folder, LOCALHOST, port))}"
    script = run.stage(stage).path / "serve.sbatch"
    script.write_text(Templates(run.scripts).serve(plan, job, command), encoding="utf-8")
    job_id = commands.submit(script, [])
    last = ""
    while True:
        queued = commands.queue().get(job_id)
        if queued is None or not queued.live:
            log = run.stage(stage).logs / f"{job_id}_batch.log"
            raise HpcRlhfError(f"job {job_id} ended before it started to serve", where=str(log), exit_code=RUN_FAILED)
        if queued.state == "RUNNING":
            past = commands.find_record(job_id)
            return job_id, commands.hostnames(past.nodes)[0] if past and past.nodes else ""
        state = f"job {job_id} {queued.state.lower()}{f' ({queued.reason})' if queued.reason else ''}"
        if state != last:
            say(f"waiting for {state}; scancel {job_id} cancels it")
            last = state
        time.sleep(_POLL)


def _arguments(name: str, folder: Path, host: str, port: int) -> list[str]:
    return ["hpc_rlhf.train.serve", str(folder), "--name", name, "--host", host, "--port", str(port)]


def _answers(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
